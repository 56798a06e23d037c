"""Dropout masks against the numpy reference, bit by bit."""

import numpy as np
import pytest
from backend import keep_mask

from trainspec.rng import drop_threshold, fold, name_key, threefry2x32


def reference_mask(key, *, step, rows, sequence_tokens, features, rate):
    element = np.asarray(rows, np.uint32)[:, None] * np.uint32(sequence_tokens)
    element = element + np.arange(sequence_tokens, dtype=np.uint32)
    shape = (*element.shape, features)
    feature = np.broadcast_to(np.arange(features, dtype=np.uint32), shape)
    bits, _ = threefry2x32(fold(key, step), feature, np.broadcast_to(element[..., None], shape))
    return bits >= np.uint32(drop_threshold(rate))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("step", [0, 1, 2**31 + 5])
# The last: rows * sequence_tokens wraps around 32 bits.
@pytest.mark.parametrize("rows", [[0, 1, 2], [7, 3], [2**30 + 1, 2**31 - 1]])
def test_mask_is_the_reference(rate, step, rows):
    shape = {"sequence_tokens": 9, "features": 20}
    key = name_key(3, "dropout", "model.layers.0.self_attn.q_proj")
    mine = keep_mask(key, step=step, rows=rows, rate=rate, **shape)
    np.testing.assert_array_equal(mine, reference_mask(key, step=step, rows=rows, rate=rate, **shape))


def test_rows_of_a_part_are_rows_of_the_whole():
    def mask(rows):
        return keep_mask((1, 2), step=4, rows=rows, sequence_tokens=8, features=16, rate=0.3)

    assert np.array_equal(mask([0, 1, 2, 3])[2:], mask([2, 3]))
    assert not np.array_equal(mask([0, 1]), mask([2, 3]))
