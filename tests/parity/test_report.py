"""The page a user looks at: self-contained, escaped, and drawn for any numbers."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import Q1, Sim, write

from parity.comparison.compare import Comparison, Finding, ending
from parity.comparison.phases import Location
from parity.comparison.structure import Structure
from parity.diff import diff
from parity.report.chart import loss_curves, loss_difference
from parity.report.heat import CELLS, heat_maps, legend, level
from parity.report.html import Report, render
from parity.report.verdict import Verdict
from trainspec.trace import TraceName

LOSSES = st.lists(st.floats(width=64), max_size=30)


def report(*findings: Finding) -> str:
    verdict = Verdict("fp64", "jax <b>", "torch", Comparison(3, findings))
    return render(Report(verdict, [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], recipe="a&b.yaml"))


def test_the_page_needs_no_other_file_and_escapes_what_it_shows():
    page = report(Finding(Location(2, "gradient", "<script>x"), 2e-3, 1e-9, 2e6))
    assert not re.search(r"(src|href)=|@import|url\(|https?://", page)
    assert "<script" not in page
    assert "jax &lt;b&gt;" in page
    assert "a&amp;b.yaml" in page


def test_a_failing_page_says_where_first():
    page = report(
        Finding(Location(1, "loss", "loss"), 0.0, 1e-9, 0.0),
        Finding(Location(2, "gradient", "model.norm.weight"), None, None, math.inf, "missing in right"),
        Finding(Location(3, "update", "model.norm.weight"), 0.5, 1e-9, 5e8),
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
    within = [name for name in names if ".2." not in name]  # what names alone show
    for structure, shown in (
        (Structure(), within),
        (Structure([TraceName(n, "linear") for n in names]), names),
    ):
        assert structure.in_order(set(shown), backward=False) == shown
        assert structure.in_order(set(shown), backward=True) == shown[::-1]


def test_a_real_page_shows_verdict_location_curves_heat_map_versions_and_recipe(tmp_path):
    left = write(Sim(), tmp_path / "left")
    diff(left, write(Sim(gradient_factor=(Q1, 1.01)), tmp_path / "right"), precision=None, out=tmp_path)
    page = (tmp_path / "report.html").read_text()
    order = [
        ">Fail<", "First divergence", ">Element<", "Around it, in causal order", "What was compared", "numpy 2.", "<svg",
        "The worst of each phase", "Every comparison",
    ]  # fmt: skip
    locations = [page.index(text) for text in order]
    assert locations == sorted(locations)
    assert page.count("<svg") == 2
    opened = re.findall(r"<details open><summary>(.*?)<span", page)
    assert [title.strip() for title in opened if "Around" not in title] == ["gradients"]
    [framed] = re.findall(r"<td class=u(\d+) id=first title=\"step (\d): ([^\"]*)\"", page)
    assert (int(framed[0]), framed[1]) == (len(legend()) - 1, "1")


def test_the_sides_recipes_are_shown_and_their_difference_marked():
    verdict = Verdict(
        "fp64", "jax", "torch", Comparison(1, (Finding(Location(1, "loss", "loss"), 0.0, 1e-9, 0.0),))
    )
    page = render(Report(verdict, [1.0], [1.0], recipes=("a: 1\nb: 2\n", "a: 1\nb: <3>\n")))
    assert 'mark class="left">b: 2<' in page
    assert 'mark class="right">b: &lt;3&gt;<' in page
    assert "the sides differ" in page
    assert "the sides differ" not in render(Report(verdict, [1.0], [1.0], recipes=("a: 1\n", "a: 1\n")))


@pytest.mark.parametrize(
    ("used", "meaning"),
    [(0.0, "equal"), (1e-7, "to 1e-07"), (0.9, "to 1"), (1.0, "to 1"), (1.01, "over, to 1000 times the bound"),
     (1e4, "over 1000 times"), (math.inf, "over 1000 times")],
)  # fmt: skip
def test_colours_change_at_the_bound(used, meaning):
    assert legend()[level(used)] == meaning


def findings(tensors: int, steps: int) -> list[Finding]:
    return [
        Finding(Location(step, phase, f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight"), 1e-12, 1e-9, 1e-3)
        for step in range(1, steps + 1)
        for phase in ("gradient", "moment1", "moment2", "update")
        for i in range(tensors)
    ]  # fmt: skip


def test_three_hundred_tensors_by_fifty_steps_are_all_there_and_the_page_is_not_huge():
    many = findings(300, 50)
    page = report(*many)
    assert page.count("<td class=u") == len(many)
    assert len(page) < 4_000_000


def test_a_long_run_is_shown_with_the_worst_of_several_steps():
    many = findings(400, 120)
    many[-1] = Finding(Location(120, "update", many[-1].location.tensor), 1.0, 1e-9, 1e9)
    maps = heat_maps(many)
    assert all(m.table.count("<td class=u") <= CELLS for m in maps)
    assert 'id=first title="step 120: 1.0e+09"' in maps[-1].table
    assert maps[-1].opened


def test_maps_are_in_causal_order_though_activations_are_seen_at_one_step_only():
    seen = [
        Finding(Location(2, "activation", "norm"), 0.0, 1e-9, 0.0),
        Finding(Location(2, "batch", "labels"), 0.0, 0.0, 0.0),
    ]
    assert [m.title for m in heat_maps([*findings(1, 1), *seen])] == [
        "batch and scalars", "activations", "gradients", "first moments", "second moments", "updates",
    ]  # fmt: skip
