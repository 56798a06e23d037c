"""JAX keeps compiled programs for the next run, where the user does not say otherwise, and tells how long compiling took."""

from __future__ import annotations

from pathlib import Path

import pytest
from backend import NAME

from trainspec.families import PRESETS
from trainspec.runs.clock import Clock

pytestmark = pytest.mark.skipif(NAME == "torch", reason="torch compiles nothing")
SETTING = "jax_compilation_cache_dir"


def test_programs_are_kept_in_the_user_s_cache_or_where_they_say(tmp_path, monkeypatch):
    import jax

    from jaxtrain import _jax, compilation

    before = _jax.setting(SETTING)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update(SETTING, None)
        compilation.use_cache()
        assert _jax.setting(SETTING) == str(tmp_path / "twintrain/jax")
        jax.config.update(SETTING, "elsewhere")
        compilation.use_cache()
        assert _jax.setting(SETTING) == "elsewhere"
    finally:
        jax.config.update(SETTING, before)
    assert compilation.cache_directory({}) == Path.home() / ".cache/twintrain/jax"


def test_what_is_compiled_is_told_while_somebody_listens():
    import jax
    import jax.numpy as jnp

    from jaxtrain.compilation import told_to

    clock = Clock()
    with told_to(clock):
        jax.jit(lambda x: jnp.sin(x) * 3.25)(1.0)
    clock.lap("heard")
    jax.jit(lambda x: jnp.cos(x) * 3.25)(1.0)
    clock.lap("not heard")
    heard, not_heard = clock.laps
    assert set(heard.of_which) == {"traced", "lowered", "compiled"}
    assert 0 < sum(heard.of_which.values()) <= heard.seconds
    assert not not_heard.of_which


def test_layers_of_wide_models_alone_are_unrolled_on_a_cpu_alone():
    from jaxtrain.decoder import is_worth_unrolling

    wide = PRESETS["llama3.2-1b"]
    assert is_worth_unrolling(wide, platform="cpu")
    assert not is_worth_unrolling(wide, platform="tpu")
    assert not is_worth_unrolling(PRESETS["tiny"], platform="cpu")
    assert not is_worth_unrolling(PRESETS["llama2-70b"], platform="cpu")
