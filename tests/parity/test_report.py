"""The page a user looks at: self-contained, escaped, and drawn for any numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from synthetic import Q1, Sim, write

from parity.comparison.compare import Comparison, Finding, ending
from parity.comparison.phases import Location
from parity.comparison.structure import Structure
from parity.diff import diff
from parity.report.chart import BOTTOM, HEIGHT, TOP, loss_curves, loss_difference
from parity.report.heat import CELLS, heat_maps, legend, level
from parity.report.html import Report, render
from parity.report.next import next_commands
from parity.report.pictures import BARS, Picture, bars, pictures
from parity.report.settings import origins_of, settings_of
from parity.report.verdict import Verdict
from trainspec.trace import Trace, TraceName
from trainspec.trace_header import TraceHeader

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
        ">Fail<", "First divergence", ">Element<", "Around it, in causal order", "Where in the tensor", "What was compared", "numpy 2.",
        "Loss of both sides",
        "The worst of each phase", "Every comparison",
    ]  # fmt: skip
    locations = [page.index(text) for text in order]
    assert locations == sorted(locations)
    assert page.count("<svg") == 2 + 3  # two of the losses, three of the tensor
    opened = re.findall(r"<details open><summary>(.*?)<span", page)
    assert [title.strip() for title in opened if "Around" not in title] == ["gradients"]
    [framed] = re.findall(r"<td class=u(\d+) id=first title=\"step (\d): ([^\"]*)\"", page)
    assert (int(framed[0]), framed[1]) == (len(legend()) - 1, "1")


def passing() -> Verdict:
    return Verdict(
        "fp64", "jax", "torch", Comparison(1, (Finding(Location(1, "loss", "loss"), 0.0, 1e-9, 0.0),))
    )


def test_the_sides_settings_stand_beside_each_other_and_what_differs_is_marked():
    recipes = ("a: 1\nb: {c: 2}\n", "a: 1\nb: {c: <3>}\nd: x\n")
    page = render(Report(passing(), [1.0], [1.0], recipes=recipes))
    marked = re.findall(r"<tr class=\"differs\">(.*?)</tr>", page)
    assert {tuple(re.findall(r">([^<]*)</td>", row)) for row in marked} == {
        ("b.c", "2", "&lt;3&gt;"),
        ("d", "–", "x"),
    }
    assert "The sides differ</span> in 2 of 3 settings" in page
    same = render(Report(passing(), [1.0], [1.0], recipes=("a: 1\n", "a: 1\n")))
    assert "Both sides have the same 1 settings" in same
    assert 'class="differs"' not in same


def test_without_recipes_the_headers_of_the_traces_are_compared(tmp_path):
    left, right = (Trace(write(Sim(), tmp_path / name)) for name in ("left", "right"))
    left.header = TraceHeader(backend="jax", plan={"data": 2}, identity={"data": "a" * 64})
    right.header = TraceHeader(backend="torch", plan={"data": 2}, identity={"data": "b" * 64})
    settings = {s.name: s for s in settings_of((), (left, right))}
    assert {name for name, s in settings.items() if s.differs} == {"backend", "identity.data"}
    assert settings["identity.data"].left == "a" * 12
    assert {s.name for s in origins_of((left, right))} == {"backend", "identity.data"}


# Q1 is [8, 6] with two heads of four outputs; its other dimension has six inputs.
def located(
    tmp_path: Path, change: Callable[[np.ndarray], None], *, tensor: str = "gradient"
) -> list[Picture]:
    """The pictures of two traces that differ as `change` says in one tensor of step 1."""
    traces = Trace(write(Sim(steps=1), tmp_path / "a")), Trace(write(Sim(steps=1), tmp_path / "b"))
    key = f"{tensor}/{Q1}"
    file = tmp_path / "b/step-000001.safetensors"
    arrays = load_file(file)
    arrays[key] = arrays[key].copy()
    change(arrays[key])
    save_file(arrays, file)
    first = Finding(Location(1, tensor, Q1), 1.0, 1e-9, 1e9, index=(0, 0), values=(0.0, 1.0))
    heads = {Q1: (0, 2)}
    return pictures(first, traces, heads=heads)


def over(picture: Picture) -> list[str]:
    """What the bars beyond the bound stand for."""
    ElementTree.fromstring(picture.svg)
    return re.findall(r'class="bar over".*?<title>(.*?): ', picture.svg)


def test_a_wrong_head_is_one_bar_and_an_equal_tensor_has_none(tmp_path):
    rows = len(Trace(write(Sim(steps=1), tmp_path / "shape")).read(1, f"gradient/{Q1}"))

    def spoil(array: np.ndarray) -> None:
        array[rows // 2 :] += 1.0

    by_head, by_output, by_input, grid = located(tmp_path, spoil)
    assert [p.title for p in (by_head, by_output, by_input)] == [
        "By head",
        "By output feature",
        "By input feature",
    ]
    assert over(by_head) == ["head 1"]
    assert over(by_output) == [f"output feature {i}" for i in range(rows // 2, rows)]
    assert "input feature 0" in over(by_input)
    cells = ElementTree.fromstring(grid.svg).findall("rect")
    assert {cell.get("class") for cell in cells[: len(cells) // 2]} == {"f0"}
    assert {cell.get("class") for cell in cells[len(cells) // 2 :]} == {"f9"}  # near the largest
    assert located(tmp_path, lambda array: None) == []


def test_what_is_not_finite_is_drawn_beyond_the_bound(tmp_path):
    def spoil(array: np.ndarray) -> None:
        array[1, 2] = np.nan

    _, by_output, by_input, _ = located(tmp_path, spoil)
    assert over(by_output) == ["output feature 1"]
    assert over(by_input) == ["input feature 2"]
    assert "not finite" in by_input.svg


@given(
    st.lists(st.floats(0, allow_nan=False, allow_subnormal=False), min_size=1, max_size=300),
    st.sampled_from([0.0, 1e-9, 1.0]),
)
def test_bars_are_drawn_for_any_errors_inside_their_frame(errors, bound):
    drawn = ElementTree.fromstring(bars(np.array(errors), "position", bound)).findall("rect")
    assert len(drawn) <= BARS
    assert len(drawn) == sum(
        any(errors[at : at + width])
        for width in [-(-len(errors) // BARS)]
        for at in range(0, len(errors), width)
    )
    for bar in drawn:
        y, height = float(bar.get("y")), float(bar.get("height"))
        assert y + 0.1 >= TOP
        assert y + height <= HEIGHT - BOTTOM + 1.1


def test_the_page_of_a_failure_shows_the_tensor_and_says_what_to_run(tmp_path):
    traces = (
        Trace(write(Sim(), tmp_path / "left")),
        Trace(write(Sim(gradient_factor=(Q1, 1.01)), tmp_path / "right")),
    )
    verdict = diff(tmp_path / "left", tmp_path / "right", precision=None, out=None)
    commands = next_commands(verdict, ["my recipe.yaml", "--set", "a.b=c"], tmp_path)
    page = render(Report(verdict, [1.0], [1.0], traces=traces, next=commands))
    assert "Where in the tensor" in page
    assert page.count("<svg") == 2 + 3
    step = verdict.comparison.first_divergence.location.step
    assert f"parity check &#39;my recipe.yaml&#39; --set a.b=c --precision fp64 --steps {step}" in page
    assert f"parity diff {tmp_path / 'left/trace'} {tmp_path / 'right/trace'} --precision fp64" in page
    assert not re.search(r"(src|href)=|@import|url\(|https?://|<script", page)
    calm = render(
        Report(passing(), [1.0], [1.0], traces=traces, next=next_commands(passing(), ["r.yaml"], tmp_path))
    )
    assert "Where in the tensor" not in calm
    assert "parity check r.yaml --precision fp32" in calm


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
