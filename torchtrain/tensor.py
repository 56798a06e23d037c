"""Tensor parallelism: layers that hold a part of their weight, and the collectives between the parts.

Which dimension of a weight is split the table says (`trainspec.plans.plan.WEIGHT_AXES`): `heads`, `kv_heads`, `mlp` and
`vocab`. A layer whose *outputs* are split is a column layer, one whose *inputs* are split a row layer; what comes out
of a row layer or an embedding is summed, so the residual stream is whole on every process (Megatron-LM, arXiv
1909.08053). A block's input is copied once for all its column layers: one sum forward and one backward per block.

Every process of a group holds the same numbers where a tensor is not split, gradients included.
"""

# T tokens, V vocabulary, E embed

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from torchtrain.families import anatomy_of
from trainspec.data import IGNORED
from trainspec.model import ModelSpec
from trainspec.params import param_table
from trainspec.plans.plan import WEIGHT_AXES

_SHARED_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_HEAD_NUMBERS = 8  # of a tensor of at most six dimensions


def compute_device() -> torch.device:
    """Where weights and activations of this process live."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Peers:
    """The processes along some axes of the mesh, and this one's place among them; alone there is no group."""

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
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        return torch.cat(parts, dim)

    def share(self, tensor: Tensor | None, source: int) -> Tensor:
        """The tensor of peer `source`, on each of them; the others give None."""
        if self.size == 1:
            assert tensor is not None
            return tensor
        # What the others have to know before it comes: its type, number of dimensions, and sizes.
        head = torch.zeros(_HEAD_NUMBERS, dtype=torch.int64)
        if tensor is not None:
            numbers = (_SHARED_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape)
            head[: len(numbers)] = torch.tensor(numbers)
        head = head.to(compute_device())
        dist.broadcast(head, group=self.group, group_src=source)
        dtype, dims, *sizes = head.tolist()
        if tensor is None:
            tensor = torch.empty(sizes[:dims], dtype=_SHARED_DTYPES[dtype], device=compute_device())
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, group=self.group, group_src=source)
        return whole


@dataclass(frozen=True)
class Mesh:
    """A process's place among those with the other parts of its layers, with other rows, and with other layers."""

    tensor: Peers
    replicas: Peers
    stages: Peers

    def total(self, number: Tensor) -> Tensor:
        """`number` becomes its sum over replicas and stages."""
        return self.stages.sum_(self.replicas.sum_(number))


class _Copy(torch.autograd.Function):
    """The same forward; the sum of the peers' gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same tensor to another branch.
        return ctx.peers.sum_(grads[0].clone(memory_format=torch.contiguous_format)), None


class _Sum(torch.autograd.Function):
    """The sum over the peers forward; the same gradient for each backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        return peers.sum_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class RowLinear(nn.Linear):
    """y = sum over the peers of W[:, mine] x[mine], plus a bias that all hold."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, peers: Peers) -> None:
        super().__init__(in_features // peers.size, out_features, bias=bias)
        self._peers = peers

    def forward(self, input: Tensor) -> Tensor:
        """The whole output, on every peer."""
        summed = _Sum.apply(F.linear(input, self.weight), self._peers)
        assert isinstance(summed, Tensor)
        return summed if self.bias is None else summed + self.bias


class WholeLinear(nn.Linear):
    """A linear layer that every peer holds whole, while each sees only its part of the output's gradient."""

    def __init__(self, in_features: int, out_features: int, *, peers: Peers) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._peers = peers

    def forward(self, input: Tensor) -> Tensor:
        """The whole output; the weight's gradient is summed, the input's is left to the block's copy."""
        return F.linear(input, _Copy.apply(self.weight, self._peers))  # pyright: ignore[reportArgumentType]


class VocabEmbedding(nn.Embedding):
    """Rows [first, first + mine) of an embedding; a token of another peer's is zero here, and comes by the sum."""

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
    """A norm of each head by itself, which every peer holds whole, while each sees its own heads only."""

    def __init__(self, norm: nn.Module, *, peers: Peers) -> None:
        super().__init__()
        self.weight = norm.weight
        self._norm, self._peers = (norm,), peers  # in a tuple, so that its weight is no second parameter

    def forward(self, x: Tensor) -> Tensor:
        """The same shape; the weight's gradient is summed."""
        return functional_call(self._norm[0], {"weight": _Copy.apply(self.weight, self._peers)}, (x,))  # pyright: ignore[reportArgumentType]


def split_layers(model: nn.Module, spec: ModelSpec, peers: Peers) -> None:
    """Put this process's part of every layer in the layer's place; weights are not filled yet."""
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
    """Have the input of every block of column layers copied once. After adapters are in: they replace the head."""
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


def own_part(x: Tensor, dim: int, peers: Peers) -> Tensor:
    """This process's part along `dim` of an `x` that all peers have; the gradient of `x` is whole again on each."""
    if peers.size == 1:
        return x
    copied = _Copy.apply(x, peers)
    assert isinstance(copied, Tensor)
    return copied.chunk(peers.size, dim)[peers.index]


def is_split(axis: str) -> bool:
    """Whether tensor parallelism splits this logical axis."""
    return WEIGHT_AXES.get(axis) == "tensor"


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The same numbers; bfloat16, which numpy has not, as ml_dtypes has it."""
    host = tensor.detach().cpu()
    if host.dtype == torch.bfloat16:
        return host.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()


def cross_entropy_sum(logits_TV: Tensor, targets_T: Tensor, peers: Peers) -> Tensor:
    """Summed cross-entropy of float logits whose vocabulary is split; targets equal to IGNORED count for nothing."""
    if peers.size == 1:
        return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")
    return _VocabCrossEntropy.apply(logits_TV, targets_T, peers)  # pyright: ignore[reportReturnType]


class _VocabCrossEntropy(torch.autograd.Function):
    """log of the sum of exponentials less the target's logit, from parts: two numbers per token travel."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, peers: Peers) -> Tensor:
        largest_T = logits_TV.amax(-1)
        dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=peers.group)
        shifted_TV = logits_TV - largest_T[:, None]
        local_T = targets_T - peers.index * logits_TV.shape[-1]
        mine_T = (local_T >= 0) & (local_T < logits_TV.shape[-1])
        local_T = local_T.masked_fill(~mine_T, 0)
        picked_T = shifted_TV.gather(-1, local_T[:, None])[:, 0].masked_fill(~mine_T, 0)
        share_TV = shifted_TV.exp_()
        both_2T = peers.sum_(torch.stack((share_TV.sum(-1), picked_T)))
        counted_T = targets_T != IGNORED
        share_TV.div_(both_2T[0][:, None]).mul_(counted_T[:, None])
        ctx.save_for_backward(share_TV, local_T, mine_T)  # an IGNORED target is no peer's
        return (both_2T[0].log() - both_2T[1]).masked_fill(~counted_T, 0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        share_TV, local_T, mine_T = ctx.saved_tensors
        slope_TV = share_TV.scatter_add(-1, local_T[:, None], -mine_T[:, None].to(share_TV.dtype))
        return slope_TV.mul_(grads[0]), None, None
