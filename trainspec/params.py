"""THE TABLE: one entry per weight. Files, initial values, decay, LoRA targets, sharding and reports read it.

Canonical names and layouts are Hugging Face's: one entry per layer, linear weights are [out, in]. The model's family
makes the entries.
"""

from __future__ import annotations

from trainspec.entry import (
    FromText,
    FromWeights,
    Init,
    Normal,
    Ones,
    Param,
    Role,
    UniformFanIn,
    Zeros,
)
from trainspec.families import family_of
from trainspec.model import ModelSpec

__all__ = [
    "FromText", "FromWeights", "Init", "Normal", "Ones", "Param", "Role", "UniformFanIn", "Zeros", "param_table",
]  # fmt: skip


def param_table(model: ModelSpec) -> tuple[Param, ...]:
    """Every weight of a model, in forward order. Norms and biases do not decay."""
    return family_of(model).table(model)
