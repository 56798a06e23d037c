"""A comparison holds a few tensors, whatever the trace, and judges them as if it held all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_blind_diagnosis import script

from parity.comparison.compare import _measure
from parity.comparison.pair import Pair
from parity.comparison.phases import Location
from parity.comparison.recent import ArraysOnDisk, RecentArrays
from parity.comparison.tolerance import Bound, CheckedPair
from trainspec.trace import Form, Trace

MEMORY = script("judging_memory")
SIZES = {"tensors": 12, "rows": 160, "columns": 160, "steps": 2}
TENSOR_BYTES = 4 * 160 * 160
# float64 copies of both sides, their reference or rule, bounds and masks of one tensor, in tensors of float32; Python's own
# objects beside them.
FEW, OBJECTS_BYTES = 45, 2_000_000


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("many")
    MEMORY.write_pair(home, **SIZES)
    return home


@pytest.mark.parametrize("kind", ["proof", pytest.param("estimated", marks=pytest.mark.full), "measured"])
def test_judging_holds_a_few_tensors(traces: Path, kind: str):
    bounds = MEMORY.bounds_of(traces)[kind]
    few, peak = MEMORY.judged(traces, bounds, held_bytes=0)
    assert peak < FEW * TENSOR_BYTES + OBJECTS_BYTES
    # The control: one that keeps what it reads has many tensors, and finds the same.
    all_of_them, whole = MEMORY.judged(traces, bounds, held_bytes=2**40)
    assert whole > 10 * SIZES["tensors"] * TENSOR_BYTES > 3 * peak
    assert few == all_of_them
    assert kind == "proof" or few.holds, few.first_divergence


def test_what_is_held_is_what_was_used_last():
    dropped = []
    held = RecentArrays(100, dropped=lambda key, _: dropped.append(key))
    one = np.zeros(5)
    for key in ("a", "b"):
        assert held.get(key, lambda: (one,))[0] is one
    held.get("a", lambda: pytest.fail("it is held"))
    held.put("c", (one, None))
    assert dropped == ["b"]
    held.put("large", (np.zeros(99),))
    assert dropped == ["b", "a", "c"]
    assert held.get("large", lambda: pytest.fail("the last is held whatever its size"))[0].size == 99
    held.forget(lambda key: key == "large")
    assert dropped[-1] == "large"


def test_what_is_spilled_comes_back_to_the_last_bit():
    spilled = ArraysOnDisk(0)
    arrays = {
        key: (np.random.default_rng(i).standard_normal((3, 2)), np.full(2, i)) for i, key in enumerate("abc")
    }
    for key, pair in arrays.items():
        spilled.put(key, pair)
    spilled.put("b", (arrays["b"][0] + 1, arrays["b"][1]))
    assert "d" not in spilled
    for key in "abcb":
        found = spilled.get(key)
        assert np.array_equal(found[0], arrays[key][0] + (key == "b"))
        assert np.array_equal(found[1], arrays[key][1])


def test_weights_before_a_step_are_the_starting_ones_and_the_updates(traces: Path):
    """In any order of names, some of them never asked for before."""
    pair, trace = Pair(Trace(traces / "left"), Trace(traces / "right"), held_bytes=0), Trace(traces / "left")
    first, last = pair.moving[0], pair.moving[-1]
    assert pair.weights(1)[first][0].dtype == np.float64
    for name in (last, first):
        wanted = trace.read_initial(f"weight/{name}").astype(np.float64) + trace.read(1, f"update/{name}")
        assert np.array_equal(pair.weights(2)[name][0], wanted)
    assert "lm_head.weight" not in pair.weights(2)
    assert len(pair.weights(2)) == SIZES["tensors"] == len(list(pair.weights(2)))


def test_type_and_shape_are_known_without_reading(traces: Path):
    trace = Trace(traces / "left")
    forms = trace.forms(1)
    assert set(forms) == set(trace.names(1))
    for key in ("batch/input_ids", "gradient/layers.3.linear.weight"):
        array = trace.read(1, key)
        assert forms[key] == Form(str(array.dtype), array.shape)


@pytest.mark.parametrize(
    "own", [np.asarray(0.5), np.full((7, 5), 0.5), np.linspace(0.1, 0.9, 5), np.zeros(())]
)
@pytest.mark.parametrize("inherited", [0.0, np.full((7, 1), 0.25)])
@pytest.mark.parametrize("has_noise", [False, True])
def test_blocks_find_what_the_whole_finds(own, inherited, has_noise, monkeypatch):
    """The first of equal elements, and every count; blocks end in the middle of a row."""
    random = np.random.default_rng(4)
    left, right = random.integers(-2, 3, (2, 7, 5)).astype(np.float64)
    noise = random.random((7, 5)) < 0.3 if has_noise else None
    checked = CheckedPair(left, right, Bound(own, inherited), undetermined=noise)
    location, found = Location(1, "gradient", "w"), []
    for block in (3, 4, 35, 100):
        monkeypatch.setattr("parity.comparison.compare.BLOCK", block)
        found.append(_measure(location, checked))
    assert found[0] == found[1] == found[2] == found[3]
    error = np.abs(left - right)
    beyond = np.maximum(error - inherited, 0.0)
    used = np.divide(
        beyond, own, out=np.where(beyond > 0, np.inf, 0.0), where=np.broadcast_to(own, (7, 5)) > 0
    )
    assert found[0].index == np.unravel_index(np.argmax(used), (7, 5))
    assert found[0].used == used.max()
    assert found[0].undetermined == np.count_nonzero(
        ((own + inherited) >= np.maximum(abs(left), abs(right)) if noise is None else noise)
        & (np.maximum(abs(left), abs(right)) > 0)
    )
    assert found[0].elements == np.count_nonzero(np.maximum(abs(left), abs(right)))
