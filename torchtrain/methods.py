"""Training methods put into a model with PEFT, with dropout from the shared counter-based generator."""

# B examples, S sequence, F features

from __future__ import annotations

from typing import assert_never

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from torchtrain.dropout import DropoutPoint, keep_mask
from trainspec.methods import Full, LoRA, Method, target_modules
from trainspec.model import ModelSpec
from trainspec.rng import name_key

# PEFT's name for the only adapter of a model; weights.py knows it from the parameters' names.
_ADAPTER = "default"


class _CounterDropout(nn.Module):
    """x / (1 - rate) where the mask of (seed, module, step, row, position, feature) keeps x, else 0.

    A recomputed forward draws the same mask, as the point moves only between microbatches. Off in eval mode.
    """

    def __init__(self, module: str, *, seed: int, rate: float, point: DropoutPoint) -> None:
        super().__init__()
        self.rate = rate
        self._key = name_key(seed, "dropout", module)
        self._point = point

    def forward(self, x_BSF: Tensor) -> Tensor:
        if not self.training:
            return x_BSF
        _, sequence_tokens, features = x_BSF.shape
        keep_BSF = keep_mask(
            self._key,
            step=self._point.step,
            rows=self._point.rows,
            sequence_tokens=sequence_tokens,
            features=features,
            rate=self.rate,
        )
        return torch.where(keep_BSF, x_BSF / (1.0 - self.rate), 0.0)


def attach(model: LlamaForCausalLM, spec: ModelSpec, method: Method, *, seed: int) -> DropoutPoint:
    """Put `method` into `model` in place; everything it does not train stops requiring gradients.

    Returns the point that LoRA's dropout reads and the step moves.
    """
    point = DropoutPoint()
    match method:
        case Full():
            pass
        case LoRA():
            _attach_lora(model, spec, method, seed=seed, point=point)
        case other:
            assert_never(other)
    return point


def _attach_lora(
    model: LlamaForCausalLM, spec: ModelSpec, method: LoRA, *, seed: int, point: DropoutPoint
) -> None:
    modules = target_modules(spec, method)
    config = LoraConfig(
        r=method.rank,
        # PEFT declares an int, but only ever divides it by the rank.
        lora_alpha=method.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=method.dropout,
        target_modules=list(modules),
        task_type="CAUSAL_LM",
    )
    # In place, unlike get_peft_model: the model stays Hugging Face's, and adapters take its dtype.
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    if method.dropout == 0.0:
        return
    for module in modules:
        layer = model.get_submodule(module)
        assert isinstance(layer, LoraLayer)
        layer.lora_dropout[_ADAPTER] = _CounterDropout(module, seed=seed, rate=method.dropout, point=point)
