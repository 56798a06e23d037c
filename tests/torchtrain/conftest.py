"""Fixtures of the tests of plans."""

from __future__ import annotations

import pytest
from plan_cases import MODELS
from plan_runs import Make
from small import recipe_maker, write_checkpoint


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("models")
    dirs = {name: write_checkpoint(root / name, spec) for name, spec in MODELS.items()}
    return recipe_maker(dirs)
