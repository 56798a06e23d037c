"""What a method has to know of the model that it is attached to."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchtrain.dropout import DropoutPoint
from torchtrain.mesh import Peers
from trainspec.model import ModelSpec


@dataclass(frozen=True)
class Site:
    """The model's sizes, dropout's seed and the point that it reads, and the peers that split the layers."""

    spec: ModelSpec
    seed: int = field(kw_only=True)
    tensor: Peers = field(kw_only=True)
    point: DropoutPoint = field(default_factory=DropoutPoint, kw_only=True)
