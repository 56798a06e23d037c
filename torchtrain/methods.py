"""Training methods put into a model, with dropout from the shared counter-based generator.

LoRA's layers are PEFT's; those of the others are in adapter.py and virtual.py.
"""

from __future__ import annotations

from typing import assert_never

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from torchtrain.adapter import attach_adapters
from torchtrain.dropout import CounterDropout, DropoutPoint
from torchtrain.tensor import Peers, RowLinear, WholeLinear, copy_inputs
from torchtrain.virtual import attach_prefix, attach_prompt
from trainspec.methods import (
    Adapter,
    Full,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    target_modules,
)
from trainspec.model import ModelSpec

# PEFT's name for the only adapter of a model; weights.py knows it from the parameters' names.
_ADAPTER = "default"


def attach(
    model: PreTrainedModel, spec: ModelSpec, method: Method, *, seed: int, tensor: Peers
) -> DropoutPoint:
    """Put `method` into `model` in place; everything it does not train stops requiring gradients.

    Returns the point that dropout reads and the step moves. An adapter of a layer that is split over the
    `tensor` peers is split alike.
    """
    point = DropoutPoint()
    model.requires_grad_(isinstance(method, Full))
    match method:
        case Full():
            pass
        case LoRA():
            _attach_lora(model, spec, method, seed=seed, point=point, tensor=tensor)
        case Adapter():
            attach_adapters(model, spec, method)
        case PromptTuning() | PTuning():
            attach_prompt(model, spec, method, seed=seed, point=point)
        case PrefixTuning():
            attach_prefix(model, spec, method, tensor=tensor)
        case other:
            assert_never(other)
    copy_inputs(model, tensor)
    return point


def _attach_lora(
    model: PreTrainedModel, spec: ModelSpec, method: LoRA, *, seed: int, point: DropoutPoint, tensor: Peers
) -> None:
    modules = target_modules(spec, method)
    config = LoraConfig(
        r=method.rank,
        # PEFT declares an int, but only ever divides it by the rank.
        lora_alpha=method.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        target_modules=list(modules),
        task_type="CAUSAL_LM",
    )
    # In place, unlike get_peft_model: the model stays Hugging Face's. Its adapters have the sizes of this process's
    # part of a layer, and no memory yet.
    with torch.device("meta"):
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for module in modules:
        layer = model.get_submodule(module)
        assert isinstance(layer, LoraLayer)
        base = layer.get_base_layer()
        assert isinstance(base, nn.Linear)
        if tensor.size > 1:
            _split_adapter(layer, base, rank=method.rank, tensor=tensor)
        if isinstance(base, RowLinear):
            point.first_feature[module] = tensor.index * base.in_features
        if method.dropout == 0.0:
            continue
        layer.lora_dropout[_ADAPTER] = CounterDropout(module, seed=seed, rate=method.dropout, point=point)


def _split_adapter(layer: LoraLayer, base: nn.Linear, *, rank: int, tensor: Peers) -> None:
    """A row layer's A sums its parts, and B is whole; a column layer's B is split, and A whole."""
    with torch.device("meta"):
        if isinstance(base, RowLinear):
            new: nn.Module = RowLinear(base.in_features * tensor.size, rank, bias=False, peers=tensor)
        else:
            new = WholeLinear(base.in_features, rank, peers=tensor)
    layer.lora_A[_ADAPTER] = new
