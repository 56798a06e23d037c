"""NaN and infinity are placed at the tensor where they come up first, at their step and in their phase."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity.check import check
from parity.runs.fixture import TinySetup, write_tiny
from parity.runs.sides import parse_side
from trainspec.data import open_dataset
from trainspec.runs.run import resolve
from trainspec.trace import Trace

# Put before a program's first import: it edits modules of that program alone, not of the reference's.
SITE = """
import sys
words = sys.orig_argv
if "-m" in words and words[words.index("-m") + 1] == {program!r}:
    from parity.runs.edit import Edit
    from parity.runs.plant import _EditedFinder
    sys.meta_path.insert(0, _EditedFinder([Edit(*each) for each in {edits!r}]))
"""
BUILD = "torchtrain.model:build_model"
IN_A_PRODUCT = (
    BUILD,
    "return __model",
    "def spoil(_, __, y):\n"
    "    y = y.clone()\n"
    "    y[0, 5, 3] = float('nan')\n"
    "    return y\n"
    "__model.model.layers[1].mlp.act_fn.register_forward_hook(spoil)\n"
    "return __model",
)
IN_A_GRADIENT = (
    BUILD,
    "return __model",
    "def spoil(gradient):\n"
    "    gradient = gradient.clone()\n"
    "    gradient[0, 7, 2] = float('inf')\n"
    "    return gradient\n"
    "def hook(_, __, y):\n"
    "    if y.requires_grad:\n"
    "        y.register_hook(spoil)\n"
    "__model.model.layers[0].mlp.register_forward_hook(hook)\n"
    "return __model",
)


def at_a_token(token: int) -> tuple[str, str, str]:
    spoilt = f"__it + (0.0 / (input_ids != {token}).astype('float32'))[..., None]"
    return ("jaxtrain.families.llama:Llama.look_up", "self.embed_tokens(__ids)", spoilt)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinySetup:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def checked(tiny, tmp_path, monkeypatch):
    """A check of two updates with `edits` in one program; the verdict and verdict.json."""

    def run(precision="fp64", *, program="", edits=(), right="torch", **sections):
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SITE.format(program=program, edits=list(edits)))
        monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ.get('PYTHONPATH', Path.cwd())}")
        precisions = {"policy": precision, "reduce": precision}
        recipe = tiny.recipe(**{"precision": precisions, "batch": {"accumulation": 1}} | sections)
        (tmp_path / "r.yaml").write_text(recipe.to_yaml())
        verdict = check(
            tmp_path / "r.yaml", left=parse_side("jax"), right=parse_side(right), precision=precision, steps=2,
            overrides=(), out=tmp_path / "out",
        )  # fmt: skip
        return verdict, json.loads((tmp_path / "out/verdict.json").read_text())

    return run


# Each mistake is placed in fp64 and in fp32, on one device in the one and on two in the other.


def test_a_nan_in_one_layer_is_placed_there(checked, tmp_path):
    verdict, written = checked(program="torchtrain", edits=[IN_A_PRODUCT])
    first = written["first_divergence"]
    assert (first["phase"], first["tensor"], first["step"]) == ("activation", "layers.1.product", 1)
    size = (
        verdict.comparison
        and Trace(tmp_path / "out/first-divergence/left/trace").read(1, "activation/layers.1.product").size
    )
    assert first["reason"] == f"not finite in right: 1 of {size} entries, first at [0, 5, 3]"
    earlier = [f for f in verdict.comparison.findings if f.location.step == 0 or f.location.phase == "batch"]
    assert earlier
    assert all(f.holds for f in earlier)
    assert not verdict.holds
    last = verdict.comparison.findings[-1]
    assert "right stopped: " in (last.reason or "")


@pytest.mark.full
def test_an_infinite_gradient_of_a_finite_loss_is_placed_in_the_backward_pass(checked):
    verdict, written = checked("fp32", program="torchtrain", edits=[IN_A_GRADIENT])
    first = written["first_divergence"]
    assert (first["phase"], first["tensor"], first["step"]) == ("activation_gradient", "layers.0.mlp", 1)
    assert first["reason"].startswith("not finite in right: 1 of ")
    assert first["reason"].endswith("first at [0, 7, 2]")
    assert all(f.holds for f in verdict.comparison.findings if f.location.phase == "activation")


@pytest.mark.full
def test_a_token_that_first_comes_in_the_second_batch_is_placed_at_that_step(checked, tiny):
    data = open_dataset(resolve(tiny.recipe()), "train")
    before, after = (data.batch(step, 4).input_ids for step in range(2))
    token = int(np.setdiff1d(after, before)[0])
    verdict, written = checked("fp32", program="jaxtrain", edits=[at_a_token(token)])
    first = written["first_divergence"]
    assert (first["phase"], first["tensor"], first["step"]) == ("activation", "embedding", 2)
    example, position = np.argwhere(after == token)[0]
    assert first["reason"].startswith("not finite in left: ")
    assert first["reason"].endswith(f"first at [{example}, {position}, 0]")
    assert verdict.comparison.steps == 1
    assert all(f.holds for f in verdict.comparison.findings if f.location.step < 2)


@pytest.mark.full
@pytest.mark.parametrize(
    ("precision", "plan", "edit", "place", "reason"),
    [
        # Each tensor peer spoils its own third feature, each replica a token of its own first row.
        (
            "fp32",
            "plan.tensor=2",
            IN_A_PRODUCT,
            ("activation", "layers.1.product"),
            ("2 of ", "first at [0, 5, 3]"),
        ),
        (
            "fp64",
            "plan.data=2",
            IN_A_GRADIENT,
            ("activation_gradient", "layers.0.mlp"),
            ("2 of ", "first at [0, 7, 2]"),
        ),
    ],
    ids=["tensor", "data"],
)
def test_what_is_not_finite_on_two_devices_is_placed_there(checked, plan, edit, place, reason, precision):
    verdict, written = checked(precision, program="torchtrain", edits=[edit], right=f"torch {plan}")
    first = written["first_divergence"]
    if (
        place[0] == "activation_gradient" and precision == "fp64"
    ):  # the loss of what was spoilt behind it is finite
        assert all(f.holds for f in verdict.comparison.findings if f.location.phase == "loss")
    assert (first["phase"], first["tensor"], first["step"]) == (*place, 1)
    assert first["reason"].startswith(f"not finite in right: {reason[0]}")
    assert first["reason"].endswith(reason[1])


@pytest.mark.full
def test_what_overflows_on_both_sides_is_said_to_be_no_difference(checked, tiny, tmp_path):
    """Gates and ups of 1e20, whose product a float32 cannot hold. A float64 can."""
    model = tmp_path / "huge"
    model.mkdir()
    for file in tiny.model("plain").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    scaled = {
        name: w * 1e20 if "gate_proj" in name or "up_proj" in name else w for name, w in weights.items()
    }
    save_file(scaled, model / "model.safetensors", metadata={"format": "pt"})
    _, written = checked("fp32", model={"from": str(model)})
    first = written["first_divergence"]
    assert (first["phase"], first["tensor"], first["step"]) == ("activation", "layers.0.product", 1)
    assert "not finite in left and right alike: " in first["reason"]
    assert "both sides overflow here, so it is no difference between them" in first["reason"]
