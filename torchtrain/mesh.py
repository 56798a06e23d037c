"""The mesh of a run: the groups of processes that this one computes with.

Ranks go along `trainspec.plans.plan.MESH_AXES`, the last axis fastest: rank = (stage * replicas + replica) * tensor + peer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from torchtrain.cluster import SESSION
from trainspec.plans.plan import Plan

_SHARED_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_HEADER_NUMBERS = 8  # of a tensor of at most six dimensions


def compute_device() -> torch.device:
    """Where weights and activations of this process live."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Peers:
    """The processes along some axes of the mesh, and this one's position among them; alone there is no group."""

    group: Any = None
    index: int = 0
    size: int = 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor` becomes its sum over the peers."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The peers' tensors joined along `dim`, in their order, on each of them."""
        if self.size == 1:
            return tensor
        mine = tensor.detach().contiguous()
        shards = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(shards, mine, group=self.group)
        return torch.cat(shards, dim)

    def share(self, tensor: Tensor | None, source: int) -> Tensor:
        """The tensor of peer `source`, on each of them; the others give None."""
        if self.size == 1:
            assert tensor is not None
            return tensor
        # What the others have to know before it comes: its type, number of dimensions, and sizes.
        header = torch.zeros(_HEADER_NUMBERS, dtype=torch.int64)
        if tensor is not None:
            numbers = (_SHARED_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape)
            header[: len(numbers)] = torch.tensor(numbers)
        header = header.to(compute_device())
        dist.broadcast(header, group=self.group, group_src=source)
        dtype, dims, *sizes = header.tolist()
        if tensor is None:
            tensor = torch.empty(sizes[:dims], dtype=_SHARED_DTYPES[dtype], device=compute_device())
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, group=self.group, group_src=source)
        return whole


@dataclass(frozen=True)
class Mesh:
    """A process's peers: with other shards of its layers, with other examples, and with other layers."""

    tensor: Peers
    replicas: Peers
    stages: Peers

    def total(self, number: Tensor) -> Tensor:
        """`number` becomes its sum over replicas and stages."""
        return self.stages.sum_(self.replicas.sum_(number))


def make_mesh(plan: Plan) -> Mesh:
    """The groups that this process is in; every process of the run makes all of them, in the same order."""
    if plan.devices == 1:
        return Mesh(tensor=Peers(), replicas=Peers(), stages=Peers())
    ranks = np.arange(plan.devices).reshape(plan.pipe, plan.replicas, plan.tensor)
    stages = _peers(ranks, 0) if plan.pipe > 1 else Peers()
    return Mesh(tensor=_peers(ranks, 2), replicas=_peers(ranks, 1), stages=stages)


def _peers(ranks: NDArray[Any], axis: int) -> Peers:
    """Those along one axis of the mesh."""
    groups = np.moveaxis(ranks, axis, -1).reshape(-1, ranks.shape[axis]).tolist()
    made = [(members, dist.new_group(members)) for members in groups]
    mine, group = next((members, group) for members, group in made if dist.get_rank() in members)
    SESSION.groups.append(group)
    return Peers(group, mine.index(dist.get_rank()), len(mine))
