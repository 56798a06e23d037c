"""Recording activations and their gradients at the points of `trainspec.trace.activation_points`, with hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from torchtrain.tensor import Peers, to_numpy


class Recording:
    """The activations of one microbatch by point, each with its gradient once the backward pass is through."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def keep(self, point: str, activation: Tensor) -> None:
        """Remember `activation` and have its gradient kept; a recomputed one is not a second one."""
        if point not in self.tensors:
            if not activation.requires_grad:
                activation.requires_grad_()  # of a frozen embedding: nothing before it is trained
            activation.retain_grad()
            self.tensors[point] = activation


@contextmanager
def recorded(model: LlamaForCausalLM) -> Iterator[Recording]:
    """Forward passes inside leave their activations in the recording."""
    recording, handles = Recording(), []
    for point, module in _modules(model).items():

        def hook(_: nn.Module, __: Any, output: Any, point: str = point) -> None:
            recording.keep(point, output[0] if isinstance(output, tuple) else output)

        handles.append(module.register_forward_hook(hook))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def by_point(
    recordings: Sequence[Recording], *, replicas: Peers, tensor: Peers, scale: float
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Activations and gradients [examples, sequence_tokens, ...] by point, of all microbatches in their order.

    Each of the `replicas` has recorded its rows of every microbatch, each of the `tensor` peers its part of the
    logits. `scale` is what the loss was multiplied by before the backward pass.
    """
    activations, gradients = {}, {}

    def whole(point: str, part: Tensor) -> NDArray[Any]:
        part = tensor.gather(part, -1) if point == "logits" else part
        return to_numpy(replicas.gather(part, 0))

    for point in recordings[0].tensors:
        tensors = [recording.tensors[point] for recording in recordings]
        activations[point] = np.concatenate([whole(point, t) for t in tensors])
        found = [torch.zeros_like(t) if t.grad is None else t.grad / scale for t in tensors]
        gradients[point] = np.concatenate([whole(point, g) for g in found])
    return activations, gradients


def _modules(model: LlamaForCausalLM) -> dict[str, nn.Module]:
    """The module whose output is each point, in forward order."""
    inner = model.model
    modules: dict[str, nn.Module] = {"embedding": inner.embed_tokens}
    for i, layer in enumerate(inner.layers):
        modules[f"layers.{i}.attention"] = layer.self_attn  # pyright: ignore[reportArgumentType]
        modules[f"layers.{i}.mlp"] = layer.mlp  # pyright: ignore[reportArgumentType]
        modules[f"layers.{i}.block"] = layer
    return modules | {"norm": inner.norm, "logits": model.lm_head}
