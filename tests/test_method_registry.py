"""Every registered method is everywhere that a method has to be: one that is left out anywhere fails here.

Each kind has a file of its own name in three packages, a small example, an adapter that is read back, a numpy oracle,
a case of interchange with PEFT, cells of the parity matrix under every plan, and a planted fault of its own.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import test_interchange
from method_oracles import ORACLES
from method_sections import sections
from small import ROOT, SMALL

from parity.faults import FAULTS
from parity.faults.fault import setup_recipe
from parity.matrix.cells import PLANS, cells
from parity.runs.fixture import TinySetup
from trainspec.errors import RecipeError
from trainspec.files.adapters import read_adapter, write_adapter
from trainspec.init import initial_value
from trainspec.methods import EXAMPLES, METHODS, full_table
from trainspec.params import Normal
from trainspec.plans.pipeline import stages_of
from trainspec.plans.plan import Plan
from trainspec.recipe import recipe_from

# What PEFT does not read, each with its reason.
NOT_IN_PEFT = {"full": "its weights are the model", "adapter": "PEFT has no bottleneck adapters"}
KINDS = tuple(METHODS)


def registered(package: str) -> dict[str, str]:
    """The `ATTACH` of a backend: the module of each kind. Read, not imported: JAX and torch never share a process."""
    tree = ast.parse((ROOT / package / "methods/__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ATTACH":
            assert isinstance(node.value, ast.Dict)
            keys = [ast.literal_eval(key) for key in node.value.keys if key is not None]
            return dict(zip(keys, (ast.unparse(value) for value in node.value.values), strict=True))
    raise AssertionError(f"{package}/methods/__init__.py has no ATTACH")


@pytest.mark.parametrize("package", ["jaxtrain", "torchtrain"])
def test_both_twins_have_every_method_in_a_file_of_the_same_name(package: str):
    home = {kind: spec.__module__.rpartition(".")[2] for kind, spec in METHODS.items()}
    assert len(set(home.values())) == len(home)
    assert registered(package) == {kind: f"{file}.attach" for kind, file in home.items()}
    for file in home.values():
        assert (ROOT / package / "methods" / f"{file}.py").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_has_examples_that_a_recipe_keeps(kind: str):
    examples = METHODS[kind].examples()
    assert examples
    for name, spec in examples.items():
        assert name.split("-")[0] == spec.kind == kind
        assert EXAMPLES[name] == spec
        tree = {"model": {"from": "preset:tiny"}, "data": {"train": "x"}, "method": spec.model_dump()}
        assert recipe_from(tree).method == spec


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_adapter_is_read_back_or_the_method_says_that_it_has_none(name: str, tmp_path: Path):
    spec = EXAMPLES[name]
    table = spec.table(SMALL)
    if spec.trains_model:
        with pytest.raises(RecipeError, match="has no adapter"):
            spec.peft_config(SMALL)
        with pytest.raises(RecipeError, match="not from an adapter"):
            spec.check_peft_config({}, directory=tmp_path, model=SMALL)
        return
    weights = {p.name: initial_value(replace(p, init=Normal(0.3)), seed=1, dtype="float32") for p in table}
    write_adapter(tmp_path / "a", weights, model=SMALL, method=spec, base="x")
    read = {p.name: w[...] for p, w in read_adapter(tmp_path / "a", SMALL, spec, table, dtype="float32")}
    assert list(read) == list(weights)
    assert all((read[name] == weights[name]).all() for name in weights)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_pipeline_has_a_stage_for_every_weight_of_a_method(name: str):
    table, plan = full_table(SMALL, EXAMPLES[name]), Plan(pipe=2, microbatches=2)
    assert len({param.name for param in table}) == len(table)
    for param in table:
        assert len(param.axes) == len(param.shape)
        assert 0 < len(stages_of(param, plan, SMALL)) <= plan.pipe


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_has_an_oracle(kind: str):
    assert kind in ORACLES


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_is_interchanged_with_peft_both_ways(kind: str):
    written = {case.method["kind"] for case in test_interchange.WRITTEN if not case.merged}
    read = {method["kind"] for _, _, method in test_interchange.MADE.values()}
    if kind in NOT_IN_PEFT:
        assert kind not in written | read
        return
    assert kind in written
    # PEFT keeps no encoder, so that what it saves of P-tuning is resumed as a prompt.
    assert kind in read or kind == "ptuning"
    if METHODS[kind]().not_merged is None:
        assert kind in {case.method["kind"] for case in test_interchange.WRITTEN if case.merged}


def test_every_example_is_in_the_matrix_under_every_plan():
    trained = {(cell.method, cell.plan) for cell in cells()}
    assert trained >= {(name, plan) for name in EXAMPLES for plan in PLANS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_has_a_fault_of_its_own(kind: str, tmp_path: Path):
    setups = {setup_recipe(TinySetup(tmp_path), fault.setup, "fp64", "jax").method.kind for fault in FAULTS}
    assert kind in setups


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_of_methods_has_every_one(kind: str):
    assert f"`{kind}`" in (ROOT / "docs/methods.md").read_text()


def test_sections_are_those_of_the_registry():
    """The tables of tests/backends, tests/torchtrain and tests/jaxtrain are made by this function."""
    assert sections({}) == {name: spec.model_dump() for name, spec in EXAMPLES.items()}
