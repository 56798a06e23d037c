"""Recording activations and their gradients at the points of `trainspec.trace.activation_points`, with hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.families import anatomy_of
from torchtrain.mesh import Mesh
from torchtrain.precision import to_numpy
from trainspec.plans.pipeline import layer_stages
from trainspec.plans.plan import Plan
from trainspec.trace import LAYER_POINTS, activation_points


class Recording:
    """The activations of one microbatch by point, each with its gradient after the backward pass."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def keep(self, point: str, activation: Tensor) -> None:
        """Remember `activation` and have its gradient kept. A recomputed one is ignored."""
        if point not in self.tensors:
            if not activation.requires_grad:
                activation.requires_grad_()  # of a frozen embedding: nothing before it is trained
            activation.retain_grad()
            self.tensors[point] = activation


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Recording]]:
    """Forward passes inside leave their activations in the last recording of the list, which starts empty.

    A layer is recomputed in its microbatch's backward pass only. Whichever recording is the last one by then, it has the
    layer's points already.
    """
    recordings: list[Recording] = []
    handles = []
    for point, module in _modules(model).items():

        def hook(_: nn.Module, __: Any, output: Any, point: str = point) -> None:
            recordings[-1].keep(point, output[0] if isinstance(output, tuple) else output)

        handles.append(module.register_forward_hook(hook))
    try:
        yield recordings
    finally:
        for handle in handles:
            handle.remove()


def point_stages(plan: Plan, layers: int) -> dict[str, int]:
    """The stage of each of `trainspec.trace.activation_points`, in their order."""
    first, *inner, norm, logits = activation_points(layers)
    of_layers = np.repeat(layer_stages(plan, layers), len(LAYER_POINTS)).tolist()
    last = plan.pipe - 1
    return {first: 0, **dict(zip(inner, of_layers, strict=True)), norm: last, logits: last}


def by_point(
    recordings: Sequence[Recording], stages: Mapping[str, int], *, mesh: Mesh, scale: float
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Activations and gradients [examples, sequence_tokens, ...] by point, of all microbatches in their order.

    `stages` is each point's stage. There each replica has recorded its examples of every microbatch, and each tensor
    peer its shard of the logits. The loss was multiplied by `scale` before the backward pass.
    """
    activations, gradients = {}, {}

    def whole(point: str, microbatches: Sequence[Tensor]) -> NDArray[Any]:
        gathered = [mesh.tensor.gather(t, -1) if point == "logits" else t for t in microbatches]
        joined = torch.cat([mesh.replicas.gather(t, 0) for t in gathered]) if gathered else None
        return to_numpy(mesh.stages.share(joined, stages[point]))

    for point in stages:
        tensors = [recording.tensors[point] for recording in recordings if point in recording.tensors]
        activations[point] = whole(point, tensors)
        scaled = [torch.zeros_like(t) if t.grad is None else t.grad / scale for t in tensors]
        gradients[point] = whole(point, scaled)
    return activations, gradients


def _modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The module whose output is each point, in forward order."""
    anatomy = anatomy_of(model)
    modules = {"embedding": anatomy.embedding(model)}
    for i, layer in enumerate(anatomy.layers(model)):
        modules[f"layers.{i}.attention"] = anatomy.attention(layer)
        modules[f"layers.{i}.mlp"] = anatomy.mlp(layer)
        modules[f"layers.{i}.block"] = layer
    return modules | {"norm": anatomy.norm(model), "logits": anatomy.head(model)}
