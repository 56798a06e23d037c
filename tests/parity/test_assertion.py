"""`assert_parity` in a test suite: silent if both sides agree, else its message has the first divergence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from parity import assert_parity
from parity.runs.fixture import write_tiny
from trainspec.errors import UserError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory):
    return write_tiny(tmp_path_factory.mktemp("tiny")).recipe()


@pytest.mark.full
def test_it_passes_and_keeps_the_report_where_asked(recipe, tmp_path: Path):
    assert_parity(recipe, left="torch", right="torch batch.accumulation=1", steps=2, out=tmp_path)
    assert "Pass" in (tmp_path / "report.html").read_text()


@pytest.mark.full
def test_a_planted_difference_is_an_assertion_error_with_its_location(recipe, tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    with pytest.raises(AssertionError) as caught:
        assert_parity(file, left="torch", right="torch optimizer.eps=1e-6", steps=1, overrides=["run.seed=3"])
    message = str(caught.value)
    assert "torch and torch optimizer.eps=1e-6 did not do the same training in fp64" in message
    assert "first divergence: step 1, update, " in message
    assert "is over the bound" in message
    assert "out=DIR" in message
    values = re.findall(r"element \[[\d, ]+\] in torch.*: (-?[\d.e+-]+)$", message, re.M)
    assert len(values) == 2
    assert float(values[0]) != float(values[1])


def test_a_mistake_in_the_recipe_is_no_assertion_error(recipe):
    with pytest.raises(UserError, match="optimizr"):
        assert_parity(recipe, overrides=["optimizr.lr=1"])


def test_importing_it_loads_no_framework():
    code = "import sys, parity; print([m for m in ('jax', 'torch', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"
