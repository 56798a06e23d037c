"""Recording activations and their gradients at the points of `trainspec.points`.

Code of ours calls `tap` at a point. Where the code is Hugging Face's or PEFT's, hooks on modules keep their outputs and
inputs, and an attention function in front of the model's keeps queries and keys as they come.
"""

# B examples, S sequence, H heads, K kv heads, D head dim

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torchtrain.families import anatomy_of
from torchtrain.layers import TiedLinear
from torchtrain.mesh import Mesh
from torchtrain.precision import to_numpy
from torchtrain.tensor_parallel import WholeLinear, gather_axis, is_split
from trainspec.plans.pipeline import layer_stages
from trainspec.plans.plan import Plan
from trainspec.points import Point

_ATTENTION = "recorded"
# Points before the layers.
_FIRST = ("prompt", "embedding")
_LAYER = re.compile(r"\blayers\.\d+\.")


@dataclass(frozen=True)
class Kept:
    """An activation, with its gradient after the backward pass; the point's is `factor` times the activation.

    `in_shares` says that each tensor peer has a share of the gradient of what all of them have.
    """

    tensor: Tensor
    factor: float = 1.0
    in_shares: bool = False


class Recording:
    """The activations of one microbatch by point."""

    def __init__(self) -> None:
        self.kept: dict[str, Kept] = {}

    def keep(self, point: str, activation: Tensor, *, factor: float = 1.0, in_shares: bool = False) -> None:
        """Remember `activation` and have its gradient kept. A recomputed one is ignored."""
        if point not in self.kept:
            if not activation.requires_grad:
                activation.requires_grad_()  # of a frozen embedding: nothing before it is trained
            activation.retain_grad()
            self.kept[point] = Kept(activation, factor, in_shares)


# What `recorded` leaves its recordings in, while it is entered.
_active: list[list[Recording]] = []


def tap(point: str, activation: Tensor) -> Tensor:
    """`activation`, which is kept if activations are recorded; the point's full name."""
    if _active:
        _active[-1][-1].keep(point, activation)
    return activation


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Recording]]:
    """Forward passes inside leave their activations in the last recording of the list, which starts empty.

    A layer is recomputed in its microbatch's backward pass only. Whichever recording is the last one by then, it has the
    layer's points already.
    """
    recordings: list[Recording] = []
    own: Any = model.config._attn_implementation
    attention = _Attention(ALL_ATTENTION_FUNCTIONS[own])
    AttentionInterface.register(_ATTENTION, attention)
    model.config._attn_implementation = _ATTENTION
    handles = [hooked.register(recordings) for hooked in _hooks(model)]
    _active.append(recordings)
    try:
        yield recordings
    finally:
        _active.pop()
        for handle in handles:
            handle.remove()
        model.config._attn_implementation = own


class _Attention:
    """The model's attention function, with queries and keys kept: they come rotated."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, module: Any, query_BHSD: Tensor, key_BKSD: Tensor, *args: Any, **rest: Any) -> Any:
        layer = f"layers.{module.layer_idx}"
        query_BSHD = tap(f"{layer}.rotated_query", query_BHSD.transpose(1, 2))
        key_BSKD = tap(f"{layer}.rotated_key", key_BKSD.transpose(1, 2))
        return self._function(module, query_BSHD.transpose(1, 2), key_BSKD.transpose(1, 2), *args, **rest)


@dataclass(frozen=True)
class _Hooked:
    """A point that is the output of a module, or with `is_input` its input."""

    point: str
    module: nn.Module
    is_input: bool = False
    factor: float = 1.0
    in_shares: bool = False

    def register(self, recordings: Sequence[Recording]) -> Any:
        """A handle that removes the hook."""

        def keep(activation: Any) -> None:
            first = activation[0] if isinstance(activation, tuple) else activation
            recordings[-1].keep(self.point, first, factor=self.factor, in_shares=self.in_shares)

        if self.is_input:
            return self.module.register_forward_pre_hook(lambda _, args: keep(args))
        return self.module.register_forward_hook(lambda _, __, output: keep(output))


def _hooks(model: PreTrainedModel) -> Iterator[_Hooked]:
    anatomy = anatomy_of(model)
    yield _Hooked("embedding", anatomy.embedding(model))
    for i, layer in enumerate(anatomy.layers(model)):
        for name, module in anatomy.outputs(layer).items():
            yield _Hooked(f"layers.{i}.{name}", module)
        for name, module in anatomy.inputs(layer).items():
            yield _Hooked(f"layers.{i}.{name}", module, is_input=True)
    yield _Hooked("norm", anatomy.norm(model))
    yield _Hooked("logits", anatomy.head(model))
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer = _LAYER.search(path)
            name = path.rpartition(".")[2]
            yield from _hooks_of_lora(f"{layer[0]}{name}" if layer else name, module)


def _hooks_of_lora(name: str, layer: LoraLayer) -> Iterator[_Hooked]:
    """A x, and the output of B, which PEFT multiplies by its scale as it adds it."""
    ((adapter, a),) = layer.lora_A.items()
    has_weight = a.source if isinstance(a, TiedLinear) else a
    yield _Hooked(f"{name}.lora_A", a, in_shares=isinstance(has_weight, WholeLinear))
    yield _Hooked(f"{name}.lora_B", layer.lora_B[adapter], factor=layer.scaling[adapter])


def point_stages(plan: Plan, layers: int, points: Sequence[Point]) -> dict[Point, int]:
    """The stage of each point, in their order."""
    of_layers = layer_stages(plan, layers)

    def stage(point: Point) -> int:
        if point.layer is not None:
            return of_layers[point.layer]
        return 0 if point.name in _FIRST else plan.pipe - 1

    return {point: stage(point) for point in points}


def by_point(
    recordings: Sequence[Recording], stages: Mapping[Point, int], *, mesh: Mesh, head_dim: int, scale: float
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Activations and gradients [examples, ...] by point, of all microbatches in their order.

    `stages` is each point's stage. There each replica has recorded its examples of every microbatch, and each tensor
    peer its shard of what is split. The loss was multiplied by `scale` before the backward pass.
    """

    def whole(point: Point, stage: int, microbatches: Sequence[Tensor]) -> NDArray[Any]:
        if point.axes[-1] == "head_dim":  # a projection's output has the heads side by side
            microbatches = [t.reshape(*t.shape[:2], -1, head_dim) for t in microbatches]
        for dim, axis in enumerate(point.axes, 1):
            if is_split(axis):
                microbatches = [gather_axis(t, dim, axis, mesh.tensor) for t in microbatches]
        joined = torch.cat([mesh.replicas.gather(t, 0) for t in microbatches]) if microbatches else None
        return to_numpy(mesh.stages.share(joined, stage))

    def gradient(kept: Kept) -> Tensor:
        if kept.tensor.grad is None:
            return torch.zeros_like(kept.tensor)
        of_point = kept.tensor.grad / (scale * kept.factor)
        return mesh.tensor.sum_(of_point) if kept.in_shares else of_point

    activations, gradients = {}, {}
    for point, stage in stages.items():
        name = point.full_name
        kept = [recording.kept[name] for recording in recordings if name in recording.kept]
        activations[name] = whole(point, stage, [each.tensor.detach() * each.factor for each in kept])
        gradients[name] = whole(point, stage, [gradient(each) for each in kept])
    return activations, gradients
