"""What a trace says about its names, and what is guessed for names that no trace describes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from synthetic import ORDER, Q1, SHAPES, Sim, write

from parity.cli import main
from parity.comparison.structure import Structure
from parity.runs.fixture import METHODS, VARIANTS
from trainspec.causal import activation_points, causal_order
from trainspec.errors import TraceError
from trainspec.families import FAMILIES
from trainspec.methods import full_table
from trainspec.points import LAYER_POINTS
from trainspec.trace import Trace, TraceName, TraceWriter

# Names of a program that is not ours.
FOREIGN = [
    "transformer.wte.weight",
    "transformer.h.2.attn.weight",
    "transformer.h.2.mlp.weight",
    "transformer.h.10.attn.weight",
    "transformer.ln_f.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_name_of_a_run_has_one_position(variant: str, method: str):
    spec = VARIANTS[variant]
    order = causal_order(spec, METHODS[method])
    names = [named.name for named in order]
    assert len(names) == len(set(names))
    assert set(names) == {p.name for p in full_table(spec, METHODS[method])} | {
        point.full_name for point in activation_points(spec, METHODS[method])
    }
    assert {n.name: n.layer for n in order if n.role != "point"} == {
        p.name: p.layer for p in full_table(spec, METHODS[method])
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_says_where_every_module_of_a_layer_stands(name: str):
    family = FAMILIES[name]
    for spec in family.presets.values():
        for param in family.table(spec):
            parts = set(param.name.split("."))
            assert param.layer is None or parts & set(family.within_layer), param.name
    assert {*family.stream_readers, "attention", "mlp", "block"} <= set(family.within_layer)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_point_comes_after_the_weights_that_it_depends_on(variant: str, method: str):
    order = [named.name for named in causal_order(VARIANTS[variant], METHODS[method])]
    after = {
        "input_norm": r"input_layernorm\.", "query": r"q_proj\.", "key": r"k_proj\.", "value": r"v_proj\.",
        "query_norm": r"q_norm\.", "key_norm": r"k_norm\.", "rotated_query": r"\.query(_norm)?$",
        "rotated_key": r"\.key(_norm)?$", "mixed": r"\.(rotated_\w+|value|prefix_\w+)$", "attention": r"(o_proj|attention_adapter)\.",
        "post_norm": r"post_attention_layernorm\.", "gate": r"gate_proj\.", "up": r"up_proj\.", "product": r"\.(gate|up)$",
        "mlp": r"(down_proj|mlp_adapter)\.", "block": r"\.(attention|mlp)$",
        "q_proj.lora_A": r"q_proj\.lora_A\.weight", "q_proj.lora_B": r"q_proj\.lora_[AB]\.weight",
        "attention_adapter.hidden": r"attention_adapter\.down\.", "prefix_key": r"prompt_encoder\.",
    }  # fmt: skip
    assert set(LAYER_POINTS) <= set(after)
    for point, pattern in after.items():
        name = f"layers.1.{point}"
        if name in order:
            at = order.index(name)
            before = [
                i
                for i, each in enumerate(order)
                if re.search(pattern, each) and ("layers.1." in each or "layers." not in each)
            ]
            assert before, point
            assert max(before) < at, (point, order[max(before)])
            later = r"attention_adapter\.up\.|q_proj\.lora_B\.weight|o_proj\."
            if point in ("attention_adapter.hidden", "q_proj.lora_A", "mixed"):
                rest = [i for i, each in enumerate(order) if re.search(later, each) and "layers.1." in each]
                assert at < max(rest)


def test_foreign_names_are_ordered_by_what_they_show():
    structure = Structure()
    assert structure.in_order(set(FOREIGN), backward=False) == FOREIGN
    assert structure.in_order(set(FOREIGN), backward=True) == FOREIGN[::-1]
    assert structure.num_layers(FOREIGN) == 2
    assert [structure.role(name) for name in FOREIGN[:2]] == ["embedding", None]
    assert structure.projection_before(FOREIGN[2]) is None
    (note,) = structure.notes(FOREIGN)
    assert "neither trace has a causal_order for 6 of the weights, such as lm_head.weight" in note
    assert f"of 2 layers; embeddings: {FOREIGN[0]})" in note
    (note,) = structure.notes(["first.query", "second.query"])  # what is not seen is said
    assert "of no layers; embeddings: none)" in note


def test_either_side_says_it_and_the_rest_comes_last():
    structure = Structure((), ORDER)
    assert structure.in_order({*SHAPES, FOREIGN[0]}, backward=False) == [*SHAPES, FOREIGN[0]]
    assert structure.notes(SHAPES) == []
    assert structure.projection_before("model.layers.1.mlp.down_proj.weight") == Q1.removesuffix(".weight")


def test_the_header_is_passed_over_by_other_readers_and_read_back(tmp_path: Path):
    TraceWriter(tmp_path).initial(
        {"w": np.ones(2)}, [TraceName("w", "linear", 3), TraceName("logits", "point")]
    )
    assert list(load_file(tmp_path / "initial.safetensors")) == ["weight/w"]
    (tmp_path / "trace.jsonl").write_text(
        json.dumps({"step": 1, "loss_sum": 1, "tokens": 1, "loss": 1, "grad_norm": 1, "lr": 1})
    )
    assert Trace(tmp_path).causal_order() == (TraceName("w", "linear", 3), TraceName("logits", "point"))
    without_header(tmp_path)
    assert Trace(tmp_path).causal_order() == ()
    for wrong in ("{", '[["w"]]', '[["w", "matrix", 0]]', '[["w", "linear", "0"]]'):
        save_file(
            {"weight/w": np.ones(2)}, tmp_path / "initial.safetensors", metadata={"causal_order": wrong}
        )
        with pytest.raises(TraceError, match="causal_order is not a list"):
            Trace(tmp_path).causal_order()


def without_header(trace: Path) -> Path:
    """As an earlier version or another program writes it."""
    save_file(load_file(trace / "initial.safetensors"), trace / "initial.safetensors")
    return trace


def test_traces_without_a_header_are_compared_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    left = without_header(write(Sim(), tmp_path / "left"))
    right = without_header(write(Sim(gradient_factor=(Q1, 1.01)), tmp_path / "right"))
    assert main(["diff", str(left), str(left)]) == 0
    assert "note: neither trace has a causal_order" in capsys.readouterr().out
    assert main(["diff", str(left), str(right), "--out", str(tmp_path)]) == 1
    first = json.loads((tmp_path / "verdict.json").read_text())["first_divergence"]
    assert (first["phase"], first["tensor"]) == ("gradient", Q1)
    capsys.readouterr()
    assert main(["diff", str(left), str(write(Sim(), tmp_path / "says"))]) == 0
    assert "causal_order" not in capsys.readouterr().out
