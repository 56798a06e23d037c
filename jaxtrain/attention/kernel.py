"""What a kernel of attention is, and what it is chosen by."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh

from jaxtrain.layers import Attend
from trainspec.plans.plan import Policy


class AttentionSite(NamedTuple):
    """Where attention is computed. `has_causal_rows` says that every row is one document, padded on the right if at all."""

    mesh: Mesh
    policy: Policy
    head_dim: int
    has_causal_rows: bool = False

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`: that of the mesh, whose devices need not be here."""
        return self.mesh.devices.flat[0].platform


class Kernel(NamedTuple):
    """A way to compute attention: `lack` is what a site lacks for it, None if nothing; `make` is its function for a site."""

    name: str
    lack: Callable[[AttentionSite], str | None]
    make: Callable[[AttentionSite], Attend]
