"""Prefix tuning: PEFT's encoder as a child of the model, and its keys and values before each layer's own.

They are not rotated, and the layers keep S positions. PEFT passes them as a cache; Hugging Face drops a cache where layers
are recomputed in the backward pass. A pass over one more token of rows finds them in the cache of attention.
"""

# B examples, S sequence, N virtual tokens, X = N + S keys of a layer, H heads, K kv heads, D head dim

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft import PrefixEncoder, PrefixTuningConfig
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torchtrain.activations import tap
from torchtrain.attention.cache import OneToken
from torchtrain.dropout import CounterDropout
from torchtrain.families import anatomy_of
from torchtrain.mesh import Peers, compute_device
from torchtrain.methods.site import Site
from torchtrain.tensor_parallel import own_shard
from trainspec.methods import ENCODER, PrefixTuning
from trainspec.methods.prefix import dropout_name
from trainspec.model import ModelSpec

# Keys and values [K, N, D] of every layer in turn: those of layer i are 2 i and 2 i + 1.
Prefix = Sequence[Tensor]


def attach(model: PreTrainedModel, method: PrefixTuning, site: Site) -> None:
    """Give every layer's attention the encoder's keys and values; the encoder's weights are on the meta device."""
    spec, widths = site.spec, method.widths(site.spec)
    with torch.device("meta"):
        config = PrefixTuningConfig(
            num_virtual_tokens=method.virtual_tokens,
            token_dim=spec.kv_heads * spec.head_dim,
            num_layers=spec.layers,
            prefix_projection=method.projection,
            encoder_hidden_size=widths.hidden,
        )
        encoder = PrefixEncoder(config)
        if method.projected == "all_layers":
            encoder.embedding = nn.Embedding(method.virtual_tokens, widths.embedding)
            encoder.transform[0] = nn.Linear(widths.embedding, widths.hidden)
    encoder.add_module("dropouts", nn.ModuleList(_dropouts(method, site)))
    model.add_module(ENCODER, encoder)
    own: Any = model.config._attn_implementation
    attention = partial(attend_after_prefix, attend=ALL_ATTENTION_FUNCTIONS[own])
    # Registered for the whole process, so by the kernel: another model may have another.
    name = f"{own}_after_prefix"
    AttentionInterface.register(name, attention)
    model.config._attn_implementation = name

    def give(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not kwargs["visible"].prefix:
            return args, kwargs
        return args, kwargs | layer_inputs(model, spec, method, tensor=site.tensor)

    # On the inner model: DeepSpeed's hook on the whole model has to come before any weight is used.
    anatomy_of(model).inner(model).register_forward_pre_hook(give, with_kwargs=True)


def layer_inputs(
    model: PreTrainedModel, spec: ModelSpec, method: PrefixTuning, *, tensor: Peers
) -> dict[str, Any]:
    """What every layer takes besides hidden states."""
    dropouts = model.get_submodule(f"{ENCODER}.dropouts") if method.dropout else None
    return {"prefix": make_prefix(model, spec, method, tensor=tensor), "prefix_dropouts": dropouts}


def _dropouts(method: PrefixTuning, site: Site) -> Iterator[CounterDropout]:
    """Dropout of the keys and the values of every layer in turn, of this process's heads."""
    spec, tensor = site.spec, site.tensor
    names = [dropout_name(i, which) for i in range(spec.layers) for which in ("key", "value")]
    for name in names if method.dropout else ():
        site.point.first_feature[name] = tensor.index * spec.kv_heads * spec.head_dim // tensor.size
        yield CounterDropout(name, seed=site.seed, rate=method.dropout, point=site.point)


def make_prefix(model: PreTrainedModel, spec: ModelSpec, method: PrefixTuning, *, tensor: Peers) -> Prefix:
    """The keys and values of every layer, of this process's kv heads."""
    encoder = model.get_submodule(ENCODER)
    tokens_1N = torch.arange(method.virtual_tokens, device=compute_device())[None]
    # PEFT's layout: virtual token, layer, keys before values, kv head, head_dim.
    shape = (method.virtual_tokens, 2 * spec.layers, spec.kv_heads, spec.head_dim)
    mine = own_shard(encoder(tokens_1N).view(shape), 2, tensor)
    return mine.permute(1, 2, 0, 3).unbind(0)


def attend_after_prefix(
    module: Any,
    query_BHSD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: None,
    *,
    attend: Callable[..., tuple[Tensor, None]],
    prefix: Prefix | None = None,
    prefix_dropouts: Sequence[nn.Module] | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What the function `attend` of the kernel gives. Keys and queries come rotated; the prefix is not.

    One more token of each row has no `prefix`: the kernel finds it in the cache.
    """
    if prefix is None:
        assert isinstance(rest["visible"], OneToken), "a pass that begins rows has its prefix"
        return attend(module, query_BHSD, key_BKSD, value_BKSD, attention_mask, **rest)
    i = module.layer_idx
    pair: Sequence[Tensor] = [
        each_KND.transpose(0, 1).expand(len(key_BKSD), -1, -1, -1)
        for each_KND in (prefix[2 * i], prefix[2 * i + 1])
    ]
    if prefix_dropouts is not None:
        drops = prefix_dropouts[2 * i : 2 * i + 2]
        pair = [drop(x.flatten(2)).view(x.shape) for drop, x in zip(drops, pair, strict=True)]
    keys_BNKD, values_BNKD = (
        tap(f"layers.{i}.{name}", x) for name, x in zip(("prefix_key", "prefix_value"), pair, strict=True)
    )
    key_BKXD = torch.cat((keys_BNKD.transpose(1, 2), key_BKSD), 2)
    value_BKXD = torch.cat((values_BNKD.transpose(1, 2), value_BKSD), 2)
    return attend(module, query_BHSD, key_BKXD, value_BKXD, attention_mask, **rest)
