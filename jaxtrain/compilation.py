"""Compiling: programs are kept on disk for the next run, and the time that it takes is told."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax import monitoring

from jaxtrain import _jax
from trainspec.runs.clock import Clock

# JAX's names of the three parts of compiling a program, and of what the cache on disk had.
_PARTS = {
    "/jax/core/compile/jaxpr_trace_duration": "traced",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowered",
    "/jax/core/compile/backend_compile_duration": "compiled",  # or read from the cache
}
_EVENTS = {
    "/jax/compilation_cache/cache_hits": "programs read from the cache",
    "/jax/compilation_cache/cache_misses": "programs written to the cache",
}


def use_cache() -> None:
    """Keep compiled programs on disk, unless the user's settings of JAX say where, or that it is off."""
    if _jax.setting("jax_compilation_cache_dir") is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory(os.environ)))


def cache_directory(environment: Mapping[str, str]) -> Path:
    """The directory of compiled programs: in the user's cache, as freedesktop.org says where that is."""
    home = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "twintrain" / "jax"


@contextmanager
def told_to(clock: Clock) -> Iterator[None]:
    """What is traced, lowered and compiled inside is told to the clock."""

    def tell(event: str, start_time: float, end_time: float, **_: Any) -> None:
        if event in _PARTS:
            clock.tell(_PARTS[event], start_time, end_time)

    def count(event: str, **_: Any) -> None:
        if event in _EVENTS:
            clock.count(_EVENTS[event])

    monitoring.register_event_time_span_listener(tell)
    monitoring.register_event_listener(count)
    try:
        yield
    finally:
        monitoring.unregister_event_time_span_listener(tell)
        monitoring.unregister_event_listener(count)
