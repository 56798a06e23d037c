"""What a command needs of the data before a backend is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from small import QA

from trainspec.backends import BACKENDS
from trainspec.checkpoints.manifest import Manifest
from trainspec.errors import DataError, RecipeError, UserError
from trainspec.training.prepare import prepare, prepare_evaluation, prepare_generation
from trainspec.training.request import TrainRequest

JAX, TORCH = BACKENDS["jax"], BACKENDS["torch"]


def test_an_evaluation_needs_the_heldout_records_alone(make_recipe, tmp_path: Path):
    measured = make_recipe(data={"train": "nothing.jsonl", "heldout": str(QA)})
    assert prepare_evaluation(measured, JAX, out=None).recipe == measured
    with pytest.raises(DataError, match=r"^data\.heldout: not given; it names the records to measure on$"):
        prepare_evaluation(make_recipe(), JAX, out=tmp_path)
    with pytest.raises(DataError, match="nothing"):
        prepare_evaluation(make_recipe(data={"heldout": "nothing.jsonl"}), JAX, out=tmp_path)


@pytest.mark.parametrize("prepares", [prepare_evaluation, prepare_generation])
def test_a_directory_without_a_checkpoint_is_no_run(make_recipe, tmp_path: Path, prepares):
    """A mistyped --out would else have the untrained model measured in place of the trained one."""
    recipe = make_recipe(data={"heldout": str(QA)})
    (tmp_path / "checkpoints/.step-000003.tmp").mkdir(parents=True)
    for out, said in {tmp_path: ";", tmp_path / "mistyped": ", which does not exist;"}.items():
        with pytest.raises(UserError, match=f"^no checkpoint under {out}{said} .* or give --untrained for"):
            prepares(recipe, JAX, out=out)
    assert prepares(recipe, JAX, out=None).recipe == recipe


def test_training_needs_the_records_of_training_and_the_heldout_ones_that_are_given(
    make_recipe, tmp_path: Path
):
    request = TrainRequest(out=tmp_path / "run")
    assert prepare(make_recipe(), JAX, request).recipe.data.heldout is None
    for split in ("train", "heldout"):
        with pytest.raises(DataError, match="nothing"):
            prepare(make_recipe(data={split: "nothing.jsonl"}), JAX, request)


def test_native_checkpoints_stay_with_their_backend(make_recipe, tmp_path: Path):
    native = make_recipe(checkpoint={"format": "native"})
    start, again = TrainRequest(out=tmp_path / "new"), TrainRequest(out=tmp_path, resume=True)
    assert prepare(native, JAX, start).recipe == native
    with pytest.raises(RecipeError, match=r"^checkpoint\.format=native: .*; use checkpoint\.format=portable"):
        prepare(native, TORCH, start)
    saved = tmp_path / "checkpoints/step-000001"
    saved.mkdir(parents=True)
    tree = native.model_dump(mode="json", by_alias=True)
    Manifest(1, tree, {}, format="native", backend="jax").write(saved)
    # Each backend resumes from what is portable or its own, whatever it will write itself.
    assert prepare(make_recipe(), JAX, again)
    with pytest.raises(
        RecipeError, match=f"^{saved}: is in the native format of jax, which torch does not read"
    ):
        prepare(make_recipe(), TORCH, again)
    Manifest(1, tree, {}, backend="jax").write(saved)
    assert prepare(make_recipe(), TORCH, again)
