"""What is known of the model that a method is put into."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchtrain.dropout import DropoutPoint
from torchtrain.mesh import Peers
from trainspec.model import ModelSpec


@dataclass(frozen=True)
class Site:
    """The model's sizes, the seed that dropout is drawn from, the point it reads, and who has the rest of a layer."""

    spec: ModelSpec
    seed: int = field(kw_only=True)
    tensor: Peers = field(kw_only=True)
    point: DropoutPoint = field(default_factory=DropoutPoint, kw_only=True)
