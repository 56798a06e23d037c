"""The base class of a model family: everything that trainspec knows of one architecture.

A family has a file here, with its weights and its `config.json`, and a twin with the forward pass in each backend. Its
weight names appear in no other file: other code reads role, axes and layer from the table, or asks the family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainspec.entry import Param
from trainspec.model import ModelSpec
from trainspec.weight import Weight

Array = NDArray[Any]


class Stored(NamedTuple):
    """Where the files of a model have a weight: the tensor, and if it holds `parts` weights, one below the other, which one."""

    name: str
    part: int = 0
    parts: int = 1


class Family(ABC):
    """One architecture. Every spec passed to a method has this family's name in `family`."""

    name: ClassVar[str]
    # The family's name in messages.
    title: ClassVar[str]
    # Its names in `config.json`: the architecture that is written comes first, then other spellings that are read.
    model_type: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    presets: ClassVar[Mapping[str, ModelSpec]]
    # Two weights that may be one: the embedding, and the head, which the table of a tied model leaves out.
    embedding: ClassVar[str]
    head: ClassVar[str]
    # Tensors in its files that are no weights but computed from its settings; an export copies them.
    derived: ClassVar[tuple[str, ...]] = ()
    # The linear modules of a layer by the names of its published code, each with the table's; of several an adapter has one A.
    published_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # What PEFT adapts of it where no target is named (its table of defaults); None where PEFT has none, and stops.
    peft_targets: ClassVar[tuple[str, ...] | None] = None
    # The modules of a layer, those that methods add, and the points of `points.LAYER_POINTS` that it has, in causal order:
    # a point comes after the modules that its value depends on.
    within_layer: ClassVar[tuple[str, ...]]
    # The first readers of the residual stream in a layer: its first norm, and the projections of that norm's output.
    stream_readers: ClassVar[tuple[str, ...]]

    @property
    def architecture(self) -> str:
        """The architecture written to `config.json`."""
        return self.architectures[0]

    def matches(self, architectures: object, model_type: object) -> bool:
        """Whether these two settings of a `config.json` mean this family; one of them may be absent."""
        if model_type not in (self.model_type, None):
            return False
        named = (
            architectures
            if isinstance(architectures, list)
            else []
            if architectures is None
            else [architectures]
        )
        return any(name in self.architectures for name in named) if named else model_type == self.model_type

    @abstractmethod
    def table(self, model: ModelSpec) -> tuple[Param, ...]:
        """Every weight of a model, in forward order. Norms and biases do not decay."""

    def stored(self, name: str) -> Stored:
        """Where its files have the weight that the table calls `name`, or the derived tensor `name`."""
        return Stored(name)

    @abstractmethod
    def spec_of(self, config: dict[str, Any], *, name: str, where: str) -> ModelSpec:
        """The spec of a parsed `config.json`. Raises ModelError for fields that are missing, malformed or unsupported."""

    @abstractmethod
    def config_of(self, model: ModelSpec) -> dict[str, Any]:
        """The `config.json` of a spec without its stored type, as `spec_of` reads it."""

    @abstractmethod
    def notes(self, config: dict[str, Any], *, where: str) -> list[str]:
        """One sentence for each setting of a `config.json` that differs from what is trained."""

    @abstractmethod
    def export_config(self, config: dict[str, Any], model: ModelSpec) -> dict[str, Any]:
        """`config` for the weights of `model`: unchanged except for what contradicts the spec."""

    @abstractmethod
    def keys_and_values(self, model: ModelSpec, weights: Mapping[str, Weight], ids: Sequence[int]) -> Array:
        """The keys (rotated, at 2 layer) and values (at 2 layer + 1) of tokens `ids` at positions 0, 1, ...: [P, 2 L, K, D]."""

    def embedded(self, weights: Mapping[str, Weight], ids: Sequence[int]) -> Array:
        """The embeddings of tokens `ids`, [P, E] in float64."""
        table = weights[self.embedding]
        vectors = {i: table[(slice(i, i + 1), slice(None))] for i in set(ids)}
        return np.concatenate([vectors[i] for i in ids]).astype(np.float64)
