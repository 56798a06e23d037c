"""Attention: a kernel takes queries, keys, values and what a query may see. What it makes of that is its own matter.

Hugging Face's layers call an attention function by its name in their configuration, with the keywords that the model was
called with: `visible` and `cache` are ours, and its own mask stays None.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from torchtrain.attention import cache as cached
from torchtrain.attention import fused, reference
from torchtrain.attention.cache import Cache, OneToken
from torchtrain.attention.visible import Visible
from trainspec.errors import PlanError
from trainspec.plans.names import AttentionChoice, Policy

__all__ = ["KERNELS", "choose_kernel", "use_kernel"]


class Kernel(Protocol):
    """A module of this folder."""

    def attend(
        self, q_BHTD: Tensor, k_BKXD: Tensor, v_BKXD: Tensor, visible: Visible, *, scale: float
    ) -> Tensor:
        """Attention's output [B, H, T, D]."""
        ...


# By their names, which are words of `plan.attention`.
KERNELS: dict[str, Kernel] = {"reference": reference, "fused": fused}


def choose_kernel(asked: AttentionChoice, *, policy: Policy, device: torch.device) -> str:
    """The kernel of a run, by its name. Raises PlanError where what is asked for cannot be had."""
    if asked == "auto":
        return "reference" if policy == "fp64" else "fused"
    if asked == "fused" and policy == "fp64" and device.type != "cpu":
        raise PlanError(
            "plan.attention=fused: on a GPU torch has no such kernel for precision.policy=fp64; use plan.attention=auto"
        )
    return asked


def use_kernel(model: PreTrainedModel, name: str) -> None:
    """Have all layers of `model` attend by that kernel."""
    registered = f"torchtrain_{name}"
    AttentionInterface.register(registered, _as_hugging_face(KERNELS[name]))
    model.config._attn_implementation = registered


def _as_hugging_face(kernel: Kernel) -> Any:
    """The kernel as a function that Hugging Face's layers call, which fills a `cache` and reads it again."""

    def attention(
        module: Any,
        query_BHTD: Tensor,
        key_BKXD: Tensor,
        value_BKXD: Tensor,
        attention_mask: None,
        *,
        visible: Visible | OneToken,
        scaling: float,
        cache: Cache | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        if isinstance(visible, OneToken):
            assert cache is not None
            key_BKXD, value_BKXD = cache.add(module.layer_idx, key_BKXD, value_BKXD, visible)
            mixed_BHTD = cached.attend(query_BHTD, key_BKXD, value_BKXD, visible, scale=scaling)
        else:
            if cache is not None:
                cache.fill(module.layer_idx, key_BKXD, value_BKXD)
            mixed_BHTD = kernel.attend(query_BHTD, key_BKXD, value_BKXD, visible, scale=scaling)
        return mixed_BHTD.transpose(1, 2).contiguous(), None

    return attention
