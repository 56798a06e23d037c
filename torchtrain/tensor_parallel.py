"""Tensor parallelism: layers that hold a shard of their weight, and the collectives between the shards.

Which dimension of a weight is split the table says (`trainspec.plans.plan.WEIGHT_AXES`): `heads`, `kv_heads`, `mlp`, `gate_up`
and `vocab`. A layer whose *outputs* are split is a column layer, one whose *inputs* are split a row layer; the output of a row
layer or an embedding is summed, so the residual stream is whole on every process (Megatron-LM, arXiv 1909.08053). A
block's input is copied once for all its column layers: one sum forward and one backward per block.

A tensor that is not split has the same value on every process of a group, and so has its gradient.
"""

# E embed

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from torchtrain.families import anatomy_of
from torchtrain.mesh import Peers
from trainspec.model import ModelSpec
from trainspec.params import param_table
from trainspec.plans.plan import PARTS, WEIGHT_AXES


class _Copy(torch.autograd.Function):
    """The identity forward; the sum of the peers' gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same tensor to another branch.
        return ctx.peers.sum_(grads[0].clone(memory_format=torch.contiguous_format)), None


class _Sum(torch.autograd.Function):
    """The sum over the peers forward; the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        return peers.sum_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class RowLinear(nn.Linear):
    """y = sum over the peers of W[:, mine] x[mine], plus a bias that each of them holds."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, peers: Peers) -> None:
        super().__init__(in_features // peers.size, out_features, bias=bias)
        self._peers = peers

    def forward(self, input: Tensor) -> Tensor:
        """The whole output, on every peer."""
        summed = _Sum.apply(F.linear(input, self.weight), self._peers)
        assert isinstance(summed, Tensor)
        return summed if self.bias is None else summed + self.bias


class WholeLinear(nn.Linear):
    """A linear layer that every peer holds whole, while each has only its share of the output's gradient."""

    def __init__(self, in_features: int, out_features: int, *, peers: Peers) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._peers = peers

    def forward(self, input: Tensor) -> Tensor:
        """The whole output. The weight's gradient is summed here, the input's by the block's copy."""
        return F.linear(input, _Copy.apply(self.weight, self._peers))  # pyright: ignore[reportArgumentType]


class VocabEmbedding(nn.Embedding):
    """Rows [first, first + num_embeddings) of an embedding. A token of another peer's is zero here; the sum adds it."""

    def __init__(self, vocab: int, embed: int, *, peers: Peers) -> None:
        super().__init__(vocab // peers.size, embed)
        self._peers = peers
        self._first = peers.index * self.num_embeddings

    def forward(self, input: Tensor) -> Tensor:
        """Embeddings [..., E], on every peer."""
        local = input - self._first
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        mine = F.embedding(local.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[..., None], 0)
        return _Sum.apply(mine, self._peers)  # pyright: ignore[reportReturnType]


class HeadNorm(nn.Module):
    """A norm of each head by itself, whose weight every peer holds whole, while each computes its own heads only."""

    def __init__(self, norm: nn.Module, *, peers: Peers) -> None:
        super().__init__()
        self.weight = norm.weight
        self._norm, self._peers = (norm,), peers  # in a tuple, so that its weight is no second parameter

    def forward(self, x: Tensor) -> Tensor:
        """The same shape; the weight's gradient is summed."""
        return functional_call(self._norm[0], {"weight": _Copy.apply(self.weight, self._peers)}, (x,))  # pyright: ignore[reportArgumentType]


def split_layers(model: nn.Module, spec: ModelSpec, peers: Peers) -> None:
    """Replace every layer by this process's shard of it; weights are not filled yet."""
    for param in param_table(spec):
        is_of_stream = param.role == "norm" and "embed" in param.axes
        if not param.name.endswith(".weight") or is_of_stream:
            continue
        old = model.get_submodule(param.module)
        if param.role == "norm":
            new: nn.Module = HeadNorm(old, peers=peers)
        elif isinstance(old, nn.Embedding):
            new = VocabEmbedding(old.num_embeddings, old.embedding_dim, peers=peers)
        else:
            assert isinstance(old, nn.Linear)
            bias = old.bias is not None
            if is_split(param.axes[0]):
                new = nn.Linear(old.in_features, old.out_features // peers.size, bias=bias)
            else:
                new = RowLinear(old.in_features, old.out_features, bias=bias, peers=peers)
        model.set_submodule(param.module, new)


def copy_inputs(model: Any, peers: Peers) -> None:
    """Copy the input of every block of column layers, once. Comes after adapters are in, which may replace the head."""
    if peers.size == 1:
        return

    def positional(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (_Copy.apply(args[0], peers), *args[1:])

    def keyword(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"hidden_states": _Copy.apply(kwargs["hidden_states"], peers)}

    anatomy = anatomy_of(model)
    for layer in anatomy.layers(model):
        anatomy.attention(layer).register_forward_pre_hook(keyword, with_kwargs=True)
        anatomy.mlp(layer).register_forward_pre_hook(positional)
    anatomy.head(model).register_forward_pre_hook(positional)


def own_shard(x: Tensor, dim: int, peers: Peers) -> Tensor:
    """This process's shard along `dim` of an `x` that all peers have; the gradient of `x` is whole on each."""
    if peers.size == 1:
        return x
    copied = _Copy.apply(x, peers)
    assert isinstance(copied, Tensor)
    return copied.chunk(peers.size, dim)[peers.index]


def gather_axis(shard: Tensor, dim: int, axis: str, peers: Peers) -> Tensor:
    """The whole of what is split along `dim`, whose logical axis is `axis`."""
    whole, parts = peers.gather(shard, dim), PARTS.get(axis, 1)
    if parts == 1 or peers.size == 1:
        return whole
    # Each peer has its share of every part.
    pieces = whole.chunk(parts * peers.size, dim)
    return torch.cat([piece for part in range(parts) for piece in pieces[part::parts]], dim)


def is_split(axis: str) -> bool:
    """Whether tensor parallelism splits this logical axis."""
    return WEIGHT_AXES.get(axis) == "tensor"
