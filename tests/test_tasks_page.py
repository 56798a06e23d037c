"""The benchmark of the tasks: what it fails for, and what its page says, also of two backends that part."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from small import ROOT

from trainspec.generation.request import Settings


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = spec_from_file_location("tasks_page", ROOT / "benchmarks/tasks.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def result(benchmark: Any, *, loss: float, chrf: float, ids: list[int]) -> Any:
    untrained = {"heldout_loss": 2.0, "chrf": 1.0}
    trained = {"heldout_loss": loss, "chrf": chrf, "step": 3}
    line = {"ids": ids, "untrained": {"ids": [1]}}
    signatures = dict.fromkeys(untrained, "how")
    figures = {"untrained": untrained, "trained": trained, "signatures": signatures}
    return benchmark.Result(figures, [line, line])


def test_a_figure_that_does_not_get_better_is_named(benchmark: Any):
    good = result(benchmark, loss=1.0, chrf=2.0, ids=[1])
    assert benchmark.failures("translation", {"jaxtrain": good, "torchtrain": good}) == []
    worse = result(benchmark, loss=2.5, chrf=1.0, ids=[1])
    assert benchmark.failures("translation", {"jaxtrain": good, "torchtrain": worse}) == [
        "translation on torch: heldout_loss was 2.00 and is 2.50", "translation on torch: chrf was 1.00 and is 1.00"
    ]  # fmt: skip


def test_backends_that_part_are_named(benchmark: Any):
    good = result(benchmark, loss=1.0, chrf=2.0, ids=[1])
    rounded = result(benchmark, loss=1.0 + 1e-12, chrf=2.0, ids=[1])
    assert benchmark.partings("translation", {"jaxtrain": good, "torchtrain": rounded}) == []
    other = result(benchmark, loss=1.0 + 1e-8, chrf=2.0, ids=[2])
    assert benchmark.partings("translation", {"jaxtrain": good, "torchtrain": other}) == [
        "translation, trained: heldout_loss is 1.0 on JAX and 1.00000001 on torch",
        "translation: 2 answers differ between the backends",
    ]


def test_the_page_says_what_the_benchmark_writes(benchmark: Any):
    """But for its figures and samples, which runs have made."""
    page = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    made = Namespace(precision="fp64", steps=60, examples=24, max_tokens=24)
    assert page.startswith(benchmark.head(made) + "\n| task |")
    assert page.endswith(benchmark.TAIL)
    tasks = " --steps 60 --page docs/tasks.md"
    assert f"benchmarks/tasks.py{tasks}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_a_run_that_was_measured_otherwise_is_not_taken(benchmark: Any, tmp_path: Path, monkeypatch):
    asked = Namespace(precision="fp64", steps=60, examples=24, max_tokens=24, out=tmp_path)
    settings = json.loads(json.dumps(asdict(Settings(max_tokens=24)))) | {"examples": 24}
    measured = {"precision": "fp64", "settings": settings, "trained": {"step": 60}}
    out = tmp_path / "translation-jaxtrain"
    out.mkdir()
    (out / "eval.json").write_text(json.dumps(measured))
    (out / "predictions.jsonl").write_text("{}\n")
    assert benchmark.result("translation", "jaxtrain", asked).figures == measured
    for name, other in {"precision": "fp32", "steps": 20, "examples": 5, "max_tokens": 9}.items():
        with pytest.raises(SystemExit, match=rf"{out} was measured with .*, not .*; remove it"):
            benchmark.result("translation", "jaxtrain", Namespace(**vars(asked) | {name: other}))
    # Without --steps it has to be as long as its recipe says.
    monkeypatch.setattr(benchmark, "updates", lambda recipe: 281)
    with pytest.raises(SystemExit, match="updates 60, not 281"):
        benchmark.result("translation", "jaxtrain", Namespace(**vars(asked) | {"steps": None}))


def test_answers_that_differ_are_counted(benchmark: Any):
    jax, torch = (result(benchmark, loss=1.0, chrf=2.0, ids=ids) for ids in ([1, 2], [1, 3]))
    lines = benchmark.differences({"translation": {"jaxtrain": jax, "torchtrain": torch}})
    assert lines[-1] == "| translation | 3 | 2 of 2 | 0 of 2 |"
    lines = benchmark.differences({"translation": {"jaxtrain": jax, "torchtrain": jax}})
    assert lines[-1] == "| translation | 3 | 2 of 2 | 2 of 2 |"


def test_a_cell_shows_a_text_as_it_is(benchmark: Any):
    assert benchmark.cell("a|b\n<*>") == "<code>a&#124;b↵&lt;&#42;></code>"
    assert benchmark.cell("") == "*nothing*"
