"""Training methods, one file per kind: each attaches itself to the model. The layers are PEFT's, where PEFT has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from torchtrain.dropout import DropoutPoint
from torchtrain.mesh import Peers
from torchtrain.methods import bottleneck, dora, full, lora, prefix, prompt, ptuning
from torchtrain.methods.site import Site
from torchtrain.methods.virtual_tokens import all_labels, all_positions, all_segments
from torchtrain.tensor_parallel import copy_inputs
from trainspec.methods import Method
from trainspec.model import ModelSpec

__all__ = ["ATTACH", "all_labels", "all_positions", "all_segments", "attach", "layer_inputs"]

# The registry: what changes a model for each kind of method.
ATTACH: dict[str, Callable[[PreTrainedModel, Any, Site], None]] = {
    "full": full.attach,
    "lora": lora.attach,
    "dora": dora.attach,
    "adapter": bottleneck.attach,
    "prompt": prompt.attach,
    "ptuning": ptuning.attach,
    "prefix": prefix.attach,
}
# What every layer takes besides hidden states, for the methods that have such inputs.
_LAYER_INPUTS: dict[str, Callable[..., dict[str, Any]]] = {"prefix": prefix.layer_inputs}


def attach(
    model: PreTrainedModel, spec: ModelSpec, method: Method, *, seed: int, tensor: Peers
) -> DropoutPoint:
    """Attach `method` to `model` in place; what it does not train no longer requires gradients.

    Returns the point that dropout reads and each microbatch moves. An adapter of a layer that the `tensor` peers split
    is split alike.
    """
    site = Site(spec, seed=seed, tensor=tensor)
    model.requires_grad_(method.trains_model)
    ATTACH[method.kind](model, method, site)
    copy_inputs(model, tensor)
    return site.point


def layer_inputs(
    model: PreTrainedModel, spec: ModelSpec, method: Method, *, tensor: Peers
) -> Callable[[], dict[str, Any]] | None:
    """A function that makes the method's inputs of every layer; None for a method without such inputs.

    A pipeline calls its layers one by one, without the hooks of the model: each stage makes these inputs once per
    microbatch, from weights that every stage has.
    """
    if method.kind not in _LAYER_INPUTS:
        return None
    return partial(_LAYER_INPUTS[method.kind], model, spec, method, tensor=tensor)
