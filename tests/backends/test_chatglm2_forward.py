"""A ChatGLM2 directory as published gives the logits of a forward pass that is written from its facts alone."""

import chatglm2
import numpy as np
from backend import logits, start_state
from small import write_tokenizer

from trainspec.data import open_dataset
from trainspec.runs.run import resolve

BOUND = 1e-12


def test_logits_are_those_of_the_published_model(make_recipe, tmp_path):
    weights = chatglm2.write_published(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    recipe = make_recipe(
        model={"from": str(tmp_path / "model")},
        method={"kind": "full"},
        precision={"policy": "fp64", "reduce": "fp64"},
        data={"packing": True, "sequence_tokens": 320},
    )
    state, batch = start_state(recipe), open_dataset(resolve(recipe), "train").batch(0, 4)
    found, checked = logits(state, batch), 0
    for example, segments in enumerate(batch.segments):
        for number in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == number)
            wanted = chatglm2.logits(weights, batch.input_ids[example, at])
            assert np.abs(found[example, at] - wanted).max() <= BOUND * np.abs(wanted).max()
            checked += 1
    assert checked > 4
    # Controls: a matrix whose halves are swapped, and heads whose other half is turned.
    at = np.flatnonzero(batch.segments[0] == 1)
    name = "transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"
    swapped = weights | {name: np.roll(weights[name], 37, axis=0)}
    assert np.abs(found[0, at] - chatglm2.logits(swapped, batch.input_ids[0, at])).max() > 1e-6
