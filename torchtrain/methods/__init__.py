"""Putting a training method into the model, one file per kind, with dropout from the shared counter-based generator.

The layers are PEFT's, where PEFT has them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from torchtrain.dropout import DropoutPoint
from torchtrain.mesh import Peers
from torchtrain.methods import bottleneck, dora, full, lora, prefix, prompt, ptuning
from torchtrain.methods.site import Site
from torchtrain.methods.virtual_tokens import all_labels, all_positions, all_visible
from torchtrain.tensor_parallel import copy_inputs
from trainspec.methods import Method
from trainspec.model import ModelSpec

__all__ = ["ATTACH", "all_labels", "all_positions", "all_visible", "attach", "layer_inputs"]

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
# What every layer is given beside hidden states: of the methods that have such a thing.
_LAYER_INPUTS: dict[str, Callable[..., dict[str, Any]]] = {"prefix": prefix.layer_inputs}


def attach(
    model: PreTrainedModel, spec: ModelSpec, method: Method, *, seed: int, tensor: Peers
) -> DropoutPoint:
    """Put `method` into `model` in place; everything it does not train stops requiring gradients.

    Returns the point that dropout reads and the step moves. An adapter of a layer that is split over the
    `tensor` peers is split alike.
    """
    site = Site(spec, seed=seed, tensor=tensor)
    model.requires_grad_(method.trains_model)
    ATTACH[method.kind](model, method, site)
    copy_inputs(model, tensor)
    return site.point


def layer_inputs(
    model: PreTrainedModel, spec: ModelSpec, method: Method, *, tensor: Peers
) -> Callable[[], dict[str, Any]] | None:
    """What makes the arguments that the method has for every layer; None where it has none.

    A pipeline calls its layers one by one, past the hooks of the model: each stage makes them once for a microbatch,
    from weights that every stage has.
    """
    if method.kind not in _LAYER_INPUTS:
        return None
    return partial(_LAYER_INPUTS[method.kind], model, spec, method, tensor=tensor)
