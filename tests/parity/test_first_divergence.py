"""A failed check names the first divergence in causal order, and both numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import Q1, Sim, write

from parity.check import check
from parity.comparison.compare import locations
from parity.comparison.pair import Pair
from parity.runs.fixture import TINY, TinySetup, write_tiny
from parity.runs.sides import parse_side
from trainspec.causal import activation_points, causal_order
from trainspec.methods import Full
from trainspec.trace import Trace


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinySetup:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def checked(tiny: TinySetup, out: Path, right: str, precision="fp64"):
    method = tiny.method("lora")
    recipe = out / "r.yaml"
    out.mkdir(exist_ok=True)
    recipe.write_text(
        tiny.recipe(method=method, precision={"policy": precision, "reduce": precision}).to_yaml()
    )
    verdict = check(
        recipe, left=parse_side("torch"), right=parse_side(right), precision=precision, steps=1, overrides=(), out=out
    )  # fmt: skip
    return verdict, json.loads((out / "verdict.json").read_text())


@pytest.mark.parametrize(
    ("right", "phase", "tensor", "looks_again"),
    [
        ("torch model.from=LLAMA3", "activation", "layers.0.rotated_query", True),
        ("torch optimizer.clip_norm=0.4", "clip", "clip_factor", False),
    ],
)
# In `make test` a NaN is looked at again (test_not_finite.py), and what is said of a difference is that of traces which were
# not trained (test_diff.py, test_diagnosis.py).
@pytest.mark.full
def test_the_first_place_is_found_by_looking_again(tiny, right, phase, tensor, looks_again, tmp_path):
    verdict, written = checked(tiny, tmp_path / "o", right.replace("LLAMA3", str(tiny.model("llama3-rope"))))
    first = verdict.comparison.first_divergence
    assert first is not None
    assert (first.location.phase, first.location.tensor, first.location.step) == (phase, tensor, 1)
    assert first.values is not None
    assert first.values[0] != first.values[1]
    assert first.index is not None
    assert list(written["first_divergence"]["values"]) == ["left", "right"]
    assert verdict.diagnosis
    assert written["diagnosis"] == verdict.diagnosis.as_json()
    assert (tmp_path / "o/first-divergence").exists() == looks_again
    said = "\n".join(verdict.lines(colour=False))
    assert f"{first.values[0]:.9g} (left)" in said
    assert "\n".join(verdict.diagnosis.lines()) in said
    assert f"next: {verdict.diagnosis.next}" in said
    assert "RECIPE" not in verdict.diagnosis.next


@pytest.mark.full
@pytest.mark.parametrize(
    ("right", "phase"),
    [
        ("torch optimizer.lr=1.00001e-3", "lr"),
        ("torch method.alpha=9", "-"),
    ],
)
def test_fp32_sees_it_too(tiny, right, phase, tmp_path):
    if phase == "-":  # the adapter's own settings say otherwise, so that is refused before anything runs
        with pytest.raises(Exception, match="alpha"):
            checked(tiny, tmp_path / "o", right, "fp32")
        return
    verdict, _ = checked(tiny, tmp_path / "o", right, "fp32")
    first = verdict.comparison.first_divergence
    assert first is not None
    assert first.location.phase == phase


def test_the_backward_pass_is_one_walk():
    weights = [
        "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight",
    ]  # fmt: skip
    spec = replace(TINY, layers=1)
    points = [point.full_name for point in activation_points(spec, Full())]
    order = [named.name for named in causal_order(spec, Full())]
    forward = [name for name in order if name in {*weights, *points}]
    assert [name for name in forward if name not in points] == weights
    assert [name for name in forward if name in points] == points
    behind = {
        "embedding": "model.embed_tokens.weight",
        "layers.0.attention": "model.layers.0.self_attn.o_proj.weight",
        "layers.0.mlp": "model.layers.0.mlp.down_proj.weight",
        "layers.0.block": "layers.0.mlp",
        "norm": "model.norm.weight",
        "logits": "lm_head.weight",
    }
    for point, before in behind.items():
        assert forward[forward.index(point) - 1] == before


def test_every_place_comes_once_and_the_clip_before_the_rate(tmp_path):
    pair = Pair(*(Trace(write(Sim(steps=1), tmp_path / side)) for side in ("a", "b")))
    seen = list(locations(pair))
    assert len(seen) == len(set(seen))
    phases = list(dict.fromkeys(location.phase for location in seen))
    assert phases[-6:] == ["grad_norm", "clip", "lr", "moment1", "moment2", "update"]
    assert [p.tensor for p in seen if p.phase == "gradient"][-1] == "model.embed_tokens.weight"
    assert Q1 in {location.tensor for location in seen}
