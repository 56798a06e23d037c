"""The page a person looks at: self-contained, escaped, and drawn for any numbers."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity.chart import loss_curves, loss_difference
from parity.compare import Comparison, Finding, ending
from parity.html import Report, render
from parity.phases import Place, in_order
from parity.verdict import Verdict

LOSSES = st.lists(st.floats(width=64), max_size=30)


def report(*findings: Finding) -> str:
    verdict = Verdict("fp64", "jax <b>", "torch", Comparison(3, findings))
    return render(Report(verdict, [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], recipe="a&b.yaml"))


def test_the_page_needs_no_other_file_and_escapes_what_it_shows():
    page = report(Finding(Place(2, "gradient", "<script>x"), 2e-3, 1e-9, 2e6))
    assert not re.search(r"(src|href)=|@import|url\(|https?://", page)
    assert "<script" not in page
    assert "jax &lt;b&gt;" in page
    assert "a&amp;b.yaml" in page


def test_a_failing_page_says_where_first():
    page = report(
        Finding(Place(1, "loss", "loss"), 0.0, 1e-9, 0.0),
        Finding(Place(2, "gradient", "model.norm.weight"), None, None, math.inf, "missing in right"),
        Finding(Place(3, "update", "model.norm.weight"), 0.5, 1e-9, 5e8),
    )
    assert "Fail" in page
    first = page[page.index("First divergence") : page.index("What was compared")]
    assert "step 2" in first
    assert "Missing in right" in first


def test_a_side_that_stopped_is_said():
    page = report(*ending((4, 3), {"right": "the loss is nan at step 4"}))
    assert "Right stopped: the loss is nan at step 4" in page


@given(left=LOSSES, right=LOSSES)
def test_curves_are_drawn_for_any_losses(left, right):
    ElementTree.fromstring(loss_curves(left, right))


@given(st.lists(st.tuples(*(st.floats(0, 1e300, allow_subnormal=False) for _ in range(2))), max_size=30))
def test_differences_are_drawn_for_any_numbers(pairs):
    ElementTree.fromstring(loss_difference([(i, *pair) for i, pair in enumerate(pairs, 1)]))


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_names_are_visited_as_data_flows(prefix):
    ordered = [
        "model.embed_tokens.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.2.self_attn.q_proj.lora_A.weight",
        "model.layers.2.self_attn.q_proj.lora_B.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.10.self_attn.q_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    names = [prefix + name for name in ordered]
    assert in_order(set(names), backward=False) == names
    assert in_order(set(names), backward=True) == names[::-1]
