"""The `method:` sections that tests train: the registry's examples, so that a new method is in every table by itself."""

from __future__ import annotations

from typing import Any

from trainspec.methods import EXAMPLES

# What LoRA's settings and full training show has tests of its own.
ADDED = tuple(name for name, spec in EXAMPLES.items() if spec.kind not in ("full", "lora"))


def sections(changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every example by name, with some settings changed."""
    assert set(changes) <= set(EXAMPLES)
    return {name: spec.model_dump() | changes.get(name, {}) for name, spec in EXAMPLES.items()}
