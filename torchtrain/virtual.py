"""Virtual tokens: PEFT's encoders as a child of the model, and where what they make enters it.

The rows of a prompt stand in front of the embedded tokens: every layer has T = N + S rows. A prefix is keys and values
in front of each layer's own, not rotated, and the layers keep S rows. Not by way of a cache, which is PEFT's: Hugging
Face drops one where layers are computed again in the backward pass.

Virtual tokens have positions 0 to N - 1, real ones start at N, and every query sees all virtual tokens before it,
whatever its document: a packed row is its documents one by one.
"""

# B examples, S sequence, N virtual tokens, T rows of a layer, E embed, H heads, K kv heads, D head dim

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import (
    PrefixEncoder,
    PrefixTuningConfig,
    PromptEmbedding,
    PromptEncoder,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from torchtrain.dropout import CounterDropout, DropoutPoint
from torchtrain.families import anatomy_of
from torchtrain.tensor import Peers, compute_device, own_part
from trainspec.data import IGNORED
from trainspec.methods import (
    ENCODER,
    LSTM_LAYERS,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    leading_rows,
    virtual_tokens,
)
from trainspec.model import ModelSpec

# Keys and values [K, N, D] of every layer in turn: those of layer i are 2 i and 2 i + 1.
Prefix = Sequence[Tensor]
_ATTENTION = "sdpa_behind_prefix"


def all_positions(positions_BS: Tensor, method: Method) -> Tensor:
    """Positions [B, T] of a layer's rows, from those of the tokens in their documents."""
    moved_BS = positions_BS + virtual_tokens(method)
    leading_N = torch.arange(leading_rows(method), device=positions_BS.device)
    return torch.cat((leading_N.expand(len(moved_BS), -1), moved_BS), 1)


def all_labels(labels_BS: Tensor, method: Method) -> Tensor:
    """Labels [B, T] of a layer's rows: a virtual token is nobody's target."""
    return F.pad(labels_BS, (leading_rows(method), 0), value=IGNORED)


def all_visible(visible_B1SS: Tensor, method: Method) -> Tensor:
    """Which key [B, 1, T, N + S] a row may see, from which token a token may see."""
    tokens_B1SK = F.pad(visible_B1SS, (virtual_tokens(method), 0), value=True)  # K: N + S keys
    # Rows in front see those before them.
    leading_NK = tokens_B1SK.new_ones(leading_rows(method), tokens_B1SK.shape[-1]).tril()
    return torch.cat((leading_NK.expand(len(tokens_B1SK), 1, -1, -1), tokens_B1SK), 2)


def attach_prompt(
    model: PreTrainedModel,
    spec: ModelSpec,
    method: PromptTuning | PTuning,
    *,
    seed: int,
    point: DropoutPoint,
) -> None:
    """Put the encoder's rows in front of what the embedding gives; the encoder's weights are on the meta device."""
    encoder = _prompt_encoder(spec, method, seed=seed, point=point)
    model.add_module(ENCODER, encoder)
    tokens_1N = torch.arange(method.virtual_tokens)[None]

    # The embedding stays as it is: it may be the head as well.
    def prepend(_: nn.Module, __: Any, embedded_BSE: Tensor) -> Tensor:
        rows_1NE = encoder(tokens_1N.to(embedded_BSE.device))
        return torch.cat((rows_1NE.expand(len(embedded_BSE), -1, -1), embedded_BSE), 1)

    anatomy_of(model).embedding(model).register_forward_hook(prepend)


def attach_prefix(model: PreTrainedModel, spec: ModelSpec, method: PrefixTuning, *, tensor: Peers) -> None:
    """Give every layer's attention the encoder's keys and values; the encoder's weights are on the meta device."""
    with torch.device("meta"):
        config = PrefixTuningConfig(
            num_virtual_tokens=method.virtual_tokens,
            token_dim=spec.kv_heads * spec.head_dim,
            num_layers=spec.layers,
            prefix_projection=method.projection,
            encoder_hidden_size=method.hidden or spec.kv_heads * spec.head_dim,
        )
        model.add_module(ENCODER, PrefixEncoder(config))
    AttentionInterface.register(_ATTENTION, attend_behind_prefix)
    model.config._attn_implementation = _ATTENTION

    def give(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"prefix": make_prefix(model, spec, method, tensor=tensor)}

    # Of the model inside: DeepSpeed's own hook on the whole model has to come before any weight is used.
    anatomy_of(model).inner(model).register_forward_pre_hook(give, with_kwargs=True)


def make_prefix(model: PreTrainedModel, spec: ModelSpec, method: PrefixTuning, *, tensor: Peers) -> Prefix:
    """The keys and values of every layer, in the kv heads of this process. A layer takes them as `prefix`."""
    encoder = model.get_submodule(ENCODER)
    tokens_1N = torch.arange(method.virtual_tokens, device=compute_device())[None]
    # PEFT's layout: virtual token, layer, keys before values, kv head, head_dim.
    shape = (method.virtual_tokens, 2 * spec.layers, spec.kv_heads, spec.head_dim)
    mine = own_part(encoder(tokens_1N).view(shape), 2, tensor)
    return mine.permute(1, 2, 0, 3).unbind(0)


def attend_behind_prefix(
    module: Any,
    query_BHSD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor,
    *,
    prefix: Prefix,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention's output [B, S, H, D]. Its keys and values have their rotation behind them, the prefix gets none."""
    keys_KND, values_KND = prefix[2 * module.layer_idx], prefix[2 * module.layer_idx + 1]
    examples = len(key_BKSD)
    key_BKTD = torch.cat((keys_KND.expand(examples, -1, -1, -1), key_BKSD), 2)
    value_BKTD = torch.cat((values_KND.expand(examples, -1, -1, -1), value_BKSD), 2)
    return sdpa_attention_forward(module, query_BHSD, key_BKTD, value_BKTD, attention_mask, **rest)


def _prompt_encoder(
    spec: ModelSpec, method: PromptTuning | PTuning, *, seed: int, point: DropoutPoint
) -> nn.Module:
    sizes: dict[str, Any] = {
        "num_virtual_tokens": method.virtual_tokens,
        "token_dim": spec.embed,
        "num_transformer_submodules": 1,
    }
    with torch.device("meta"):
        if isinstance(method, PromptTuning):
            return PromptEmbedding(PromptTuningConfig(**sizes), None)
        hidden = method.hidden or spec.embed
        kind = method.encoder.upper()
        encoder = PromptEncoder(
            PromptEncoderConfig(encoder_reparameterization_type=kind, encoder_hidden_size=hidden, **sizes)
        )
        if method.encoder == "lstm":
            between = nn.Identity()
            if method.dropout:
                name = f"{ENCODER}.lstm_head"
                between = CounterDropout(name, seed=seed, rate=method.dropout, point=point, shared=True)
            encoder.lstm_head = _LSTM(spec.embed, hidden, between=between)
        return encoder


class _LSTM(nn.LSTM):
    """PEFT's LSTM, bidirectional, with `between` its layers in the place of torch's own dropout."""

    def __init__(self, inputs: int, hidden: int, *, between: nn.Module) -> None:
        super().__init__(inputs, hidden, num_layers=LSTM_LAYERS, bidirectional=True, batch_first=True)
        self._between = between

    def forward(self, x_BNF: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Hidden states [B, N, 2 hidden] of the last layer; nobody asks for the last states."""
        start = x_BNF.new_zeros(2, len(x_BNF), self.hidden_size)
        each = len(self._flat_weights) // self.num_layers
        for layer in range(self.num_layers):
            if layer > 0:
                x_BNF = self._between(x_BNF)
            weights: list[Any] = self._flat_weights[layer * each : (layer + 1) * each]
            # cuDNN's would round to TF32, and wants all weights in one piece of memory.
            with torch.backends.cudnn.flags(enabled=False):
                x_BNF, _, _ = torch.lstm(
                    x_BNF, (start, start), weights, True, 1, 0.0, self.training, True, True
                )
        return x_BNF, None
