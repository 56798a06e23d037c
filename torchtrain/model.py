"""Hugging Face's module of a model, made from a ModelSpec and held to the numerics contract."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from transformers import PreTrainedModel

from torchtrain.attention import choose_kernel, use_kernel
from torchtrain.families import FAMILIES
from torchtrain.layers import RMSNorm, rotary_tables
from torchtrain.mesh import Peers, compute_device
from torchtrain.precision import accumulation_dtype, compute_dtype
from torchtrain.tensor_parallel import split_layers
from trainspec.model import ModelSpec
from trainspec.plans.names import AttentionChoice, Policy


def build_model(
    spec: ModelSpec, *, policy: Policy, remat: str, attention: AttentionChoice, tensor: Peers
) -> PreTrainedModel:
    """This process's shards of the module, on the meta device: `weights.allocate` gives every weight its memory.

    `remat` full recomputes each layer in the backward pass. fp64 runs get RMSNorms of our own, as Hugging Face's
    compute in float32. `attention` is the plan's; raises PlanError where it cannot be had. Differs from jaxtrain, where activations are constrained to a sharding: here layers are split.
    """
    anatomy = FAMILIES[spec.family]
    dtype = compute_dtype(policy)
    with torch.device("meta"):  # no memory and no random numbers for weights that are filled later
        model = anatomy.make(spec)
        if policy == "fp64":
            _use_float64_norms(model, anatomy.norms, spec.norm_eps)
        if tensor.size > 1:
            split_layers(model, spec, tensor)
        model.to(dtype)  # pyright: ignore[reportArgumentType]
    use_kernel(model, choose_kernel(attention, policy=policy, device=compute_device()))
    model.tie_weights()
    anatomy.put_rotary(model, rotary_tables(spec, accumulation_dtype(dtype)))
    if remat == "full":
        with warnings.catch_warnings():
            # transformers 5.23 warns that it will be gone in 6, and 5.17 has no other name for it.
            warnings.simplefilter("ignore", FutureWarning)
            # A layer draws no random numbers of torch's, whose state need not be kept for the recomputation.
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model


def _use_float64_norms(model: PreTrainedModel, norms: tuple[type[nn.Module], ...], eps: float) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, norms):
            model.set_submodule(name, RMSNorm(module.weight, eps))  # pyright: ignore[reportArgumentType]
