"""What a model family is: everything that the neutral package knows of one architecture, as one object.

A family has a file of its own here, with its weights and its `config.json`, and a twin with its forward pass in each
backend. Nothing outside of these files knows a family's names of weights. Other code asks the table for a weight's role,
axes and layer, or asks the family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trainspec.entry import Param
from trainspec.model import ModelSpec
from trainspec.weight import Weight

Array = NDArray[Any]


class Family(ABC):
    """One architecture. Methods that are given a spec are given one whose `family` is this one's name."""

    name: ClassVar[str]
    # The word for a model of the family in a sentence.
    title: ClassVar[str]
    # What `config.json` names it by: the architecture that is written first, then other spellings that are read.
    model_type: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    presets: ClassVar[Mapping[str, ModelSpec]]
    # The names of two weights that may be one: the embedding, and the head (which a tied model has not in its table).
    embedding: ClassVar[str]
    head: ClassVar[str]
    # The modules of a layer, its bottleneck adapters and its activation points, as data flows.
    within_layer: ClassVar[tuple[str, ...]]
    # What reads the residual stream first in a layer: its first norm, and the projections of what that gives.
    stream_readers: ClassVar[tuple[str, ...]]

    @property
    def architecture(self) -> str:
        """The architecture that `config.json` is written with."""
        return self.architectures[0]

    def matches(self, architectures: object, model_type: object) -> bool:
        """Whether these two settings of a `config.json` mean this family; either may be absent, not both."""
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

    @abstractmethod
    def spec_of(self, config: dict[str, Any], *, name: str, where: str) -> ModelSpec:
        """The spec of a parsed `config.json`. Raises ModelError for what is missing, malformed or unsupported."""

    @abstractmethod
    def config_of(self, model: ModelSpec) -> dict[str, Any]:
        """The `config.json` of a spec, without its stored type: what `spec_of` reads back."""

    @abstractmethod
    def notes(self, config: dict[str, Any], *, where: str) -> list[str]:
        """What in a `config.json` says something else than what is trained, a sentence for each."""

    @abstractmethod
    def export_config(self, config: dict[str, Any], model: ModelSpec) -> dict[str, Any]:
        """`config` for the weights of `model`: as it is, but for what contradicts the spec."""

    @abstractmethod
    def keys_and_values(self, model: ModelSpec, weights: Mapping[str, Weight], ids: Sequence[int]) -> Array:
        """What attention to the tokens `ids` at positions 0, 1, ... reads: [P, 2 L, K, D], keys (rotated) at 2 layer."""

    def embedded(self, weights: Mapping[str, Weight], ids: Sequence[int]) -> Array:
        """What the first layer is given of the tokens `ids`, [P, E] in float64."""
        table = weights[self.embedding]
        vectors = {i: table[(slice(i, i + 1), slice(None))] for i in set(ids)}
        return np.concatenate([vectors[i] for i in ids]).astype(np.float64)
