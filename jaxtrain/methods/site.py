"""What is known of the model that a method is put into."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtrain.weights import Order
from trainspec.model import ModelSpec


@dataclass(frozen=True)
class Site:
    """The model's sizes, the seed that dropout is drawn from, and the layer at each place of a stack."""

    spec: ModelSpec
    seed: int = field(kw_only=True)
    order: Order = field(kw_only=True)
