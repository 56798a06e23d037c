"""What a method has to know of the model that it changes."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtrain.weights import Order
from trainspec.model import ModelSpec


@dataclass(frozen=True)
class Site:
    """The model's sizes, the seed of dropout, and the layer in each slot of a stack."""

    spec: ModelSpec
    seed: int = field(kw_only=True)
    order: Order = field(kw_only=True)
