"""What a command needs of the data before a backend is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import QA

from trainspec.backends import BACKENDS
from trainspec.errors import DataError
from trainspec.runs.prepare import prepare, prepare_evaluation
from trainspec.runs.request import TrainRequest

JAX = BACKENDS["jax"]


def test_an_evaluation_needs_the_heldout_records_alone(make_recipe):
    measured = make_recipe(data={"train": "nothing.jsonl", "heldout": str(QA)})
    assert prepare_evaluation(measured, JAX).recipe == measured
    with pytest.raises(DataError, match=r"^data\.heldout: not given; it names the records to measure on$"):
        prepare_evaluation(make_recipe(), JAX)
    with pytest.raises(DataError, match="nothing"):
        prepare_evaluation(make_recipe(data={"heldout": "nothing.jsonl"}), JAX)


def test_training_needs_the_records_of_training_and_the_heldout_ones_that_are_given(
    make_recipe, tmp_path: Path
):
    request = TrainRequest(out=tmp_path / "run")
    assert prepare(make_recipe(), JAX, request).recipe.data.heldout is None
    for split in ("train", "heldout"):
        with pytest.raises(DataError, match="nothing"):
            prepare(make_recipe(data={split: "nothing.jsonl"}), JAX, request)
