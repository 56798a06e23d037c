"""DeepSpeed's private names are in one file, which says for which version it was written; and its start wastes no time."""

import ast
import gc
import re
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchtrain import _deepspeed
from torchtrain.cluster import finish, start

PACKAGE = Path(_deepspeed.__file__).parent
# Private names of other libraries, where they have no public ones.
OF_OTHERS = {"_attn_implementation"}
# Attributes without an underscore that only that version is known to have.
VERSIONED = {
    "__compatible_ops__",
    "averaged_gradients",
    "ds_pipe_replicated",
    "ds_tensor",
    "fp32_groups_gradients_flat",
    "fp32_partitioned_groups_flat",
    "get_grads_for_norm",
    "grad_partitions_flat_buffer",
    "mpu",
    "pipe_buffers",
    "runtime",
    "scaled_global_norm",
    "tensor_model_parallel",
    "tied_comms",
    "using_bf16_optimizer",
}


def names(source: str) -> Iterator[str]:
    """Attributes of other objects that are private or known of one version, and imports of deepspeed."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls" | "_deepspeed")):
                pass
            case ast.Attribute(attr=name) if name in VERSIONED or re.match("_[a-zA-Z]", name):
                yield name
            case ast.Import(names=aliases):
                yield from (a.name for a in aliases if a.name.partition(".")[0] == "deepspeed")
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] == "deepspeed":
                yield module


def test_no_other_file_uses_a_private_name_of_deepspeed():
    others = [path for path in PACKAGE.rglob("*.py") if path.name != "_deepspeed.py"]
    assert len(others) > 30
    for path in others:
        assert set(names(path.read_text())) <= OF_OTHERS, path
    # Negative control: in that file there are many, and each that is listed above.
    used = set(names((PACKAGE / "_deepspeed.py").read_text()))
    assert {*VERSIONED, "deepspeed", "_exec_schedule", "_get_norm_groups"} <= used


@pytest.mark.parametrize("installed", ["0.20.1", "0.19.8+cu130", "0.19.8"])
def test_another_version_is_told_once(make_recipe, monkeypatch, capsys, installed):
    monkeypatch.setattr(_deepspeed.import_deepspeed(), "__version__", installed)
    _deepspeed.report_version.cache_clear()
    for _ in range(2):
        start(make_recipe())
        finish()
    line = (
        "deepspeed 0.20.1 is installed; torchtrain was written for and tested with 0.19.8: "
        "if a run fails or parity sees a difference, install deepspeed==0.19.8\n"
    )
    assert capsys.readouterr().err == (line if installed == "0.20.1" else "")


def test_a_run_without_deepspeed_says_nothing_of_it(make_recipe, monkeypatch, capsys):
    monkeypatch.setattr(_deepspeed.import_deepspeed(), "__version__", "0.20.1")
    _deepspeed.report_version.cache_clear()
    start(make_recipe(precision={"policy": "fp64", "reduce": "fp64"}))
    finish()
    assert capsys.readouterr().err == ""


def test_the_version_that_is_installed_for_development_is_this():
    assert f'"deepspeed=={_deepspeed.WRITTEN_FOR}"' in (PACKAGE.parent / "pyproject.toml").read_text()


def test_a_start_collects_no_garbage_but_its_own(capsys):
    """DeepSpeed collects six times while it starts; what was there before is not looked through."""

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    gc.disable()
    try:
        before = weakref.ref(Cycle())
        with _deepspeed.starting():
            inside = weakref.ref(Cycle())
            gc.collect()
            assert (before() is None, inside() is None) == (False, True)
            print("what memory there is")
        assert capsys.readouterr().out == ""
        gc.collect()
        assert before() is None
    finally:
        gc.enable()
