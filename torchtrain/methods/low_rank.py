"""What LoRA and DoRA share: PEFT's layers in place of linear ones, split like these."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from torchtrain.dropout import CounterDropout
from torchtrain.layers import TiedLinear
from torchtrain.mesh import Peers
from torchtrain.methods.site import Site
from torchtrain.tensor_parallel import RowLinear, WholeLinear
from trainspec.methods import LowRank, target_modules

# PEFT's name for a model's only adapter; it is in the parameters' names that weights.py reads.
_ADAPTER = "default"


def replace_targets(model: PreTrainedModel, method: LowRank, site: Site) -> list[LoraLayer]:
    """Replace each target by PEFT's layer; returns these in the order of the table."""
    modules, seed, point, tensor = target_modules(site.spec, method), site.seed, site.point, site.tensor
    config = LoraConfig(
        r=method.rank,
        # PEFT declares an int, but only ever divides it by the rank.
        lora_alpha=method.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        target_modules=list(modules),
        task_type="CAUSAL_LM",
    )
    # In place, unlike get_peft_model: the model stays Hugging Face's. The adapters have the sizes of this process's
    # shard of a layer, and no memory yet.
    with torch.device("meta"):
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    layers: list[LoraLayer] = []
    by_module: dict[str, LoraLayer] = {}
    for module in modules:
        layer = model.get_submodule(module)
        assert isinstance(layer, LoraLayer)
        base = layer.get_base_layer()
        assert isinstance(base, nn.Linear)
        layers.append(layer)
        by_module[module] = layer
        owner = method.tied(module)
        if owner != module:
            layer.lora_A[_ADAPTER] = TiedLinear(by_module[owner].lora_A[_ADAPTER])
        elif tensor.size > 1:
            _split_adapter(layer, base, rank=method.rank, tensor=tensor)
        if isinstance(base, RowLinear):
            point.first_feature[module] = tensor.index * base.in_features
        if method.dropout == 0.0:
            continue
        # Parts of a fused matrix take the same input, dropped alike.
        layer.lora_dropout[_ADAPTER] = CounterDropout(owner, seed=seed, rate=method.dropout, point=point)
    return layers


def _split_adapter(layer: LoraLayer, base: nn.Linear, *, rank: int, tensor: Peers) -> None:
    """Of a row layer A is split, with its output summed, and B whole; of a column layer A is whole and B split."""
    with torch.device("meta"):
        if isinstance(base, RowLinear):
            new: nn.Module = RowLinear(base.in_features * tensor.size, rank, bias=False, peers=tensor)
        else:
            new = WholeLinear(base.in_features, rank, peers=tensor)
    layer.lora_A[_ADAPTER] = new
