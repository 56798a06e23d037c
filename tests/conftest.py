"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small import ROOT, VARIANTS, recipe_maker, write_checkpoint

from trainspec.recipe import Recipe

pytest_plugins = ["share"]

QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

# Tests of arithmetic take no GPU or TPU that happens to be there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Test processes share two cores, so waiting threads must not spin. Read when torch is loaded, and inherited.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Most of a JAX test is compilation: take the compiler's short ways, and compile an equal program once.
os.environ.setdefault("XLA_FLAGS", QUICK_COMPILE)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "build/jax-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory per variant; `tied` is sharded with an index."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: write_checkpoint(root / name, spec, shard_bytes=40_000 if name == "tied" else 2**30)
        for name, spec in VARIANTS.items()
    }


@pytest.fixture
def make_recipe(model_dirs: dict[str, Path]) -> Callable[..., Recipe]:
    """`recipe_maker` of these models."""
    return recipe_maker(model_dirs)
