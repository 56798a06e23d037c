"""P-tuning: PEFT's encoder of virtual tokens as a child of the model."""

# B examples, N virtual tokens, F features

from __future__ import annotations

from typing import Any

import torch
from peft import PromptEncoder, PromptEncoderConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.dropout import CounterDropout
from torchtrain.methods.site import Site
from torchtrain.methods.virtual_tokens import put_in_front
from trainspec.methods import ENCODER, LSTM_LAYERS, PTuning


def attach(model: PreTrainedModel, method: PTuning, site: Site) -> None:
    """Put the encoder's output before the embedded tokens; the encoder's weights are on the meta device."""
    hidden = method.hidden or site.spec.embed
    with torch.device("meta"):
        config = PromptEncoderConfig(
            num_virtual_tokens=method.virtual_tokens,
            token_dim=site.spec.embed,
            num_transformer_submodules=1,
            encoder_reparameterization_type=method.encoder.upper(),  # pyright: ignore[reportArgumentType]
            encoder_hidden_size=hidden,
        )
        encoder = PromptEncoder(config)
        if method.encoder == "lstm":
            encoder.lstm_head = _LSTM(site.spec.embed, hidden, between=_between(method, site))
    put_in_front(model, encoder, method.virtual_tokens)


def _between(method: PTuning, site: Site) -> nn.Module:
    """Dropout between the layers of the LSTM, if there is any."""
    if not method.dropout:
        return nn.Identity()
    name = f"{ENCODER}.lstm_head"
    return CounterDropout(name, seed=site.seed, rate=method.dropout, point=site.point, shared=True)


class _LSTM(nn.LSTM):
    """PEFT's bidirectional LSTM, with `between` its layers in place of torch's dropout."""

    def __init__(self, inputs: int, hidden: int, *, between: nn.Module) -> None:
        super().__init__(inputs, hidden, num_layers=LSTM_LAYERS, bidirectional=True, batch_first=True)
        self._between = between

    def forward(self, x_BNF: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Hidden states [B, N, 2 hidden] of the last layer; the last states, which are not used, are None."""
        start = x_BNF.new_zeros(2, len(x_BNF), self.hidden_size)
        each = len(self._flat_weights) // self.num_layers
        for layer in range(self.num_layers):
            if layer > 0:
                x_BNF = self._between(x_BNF)
            weights: list[Any] = self._flat_weights[layer * each : (layer + 1) * each]
            # cuDNN's LSTM would round to TF32, and wants all weights in one buffer.
            with torch.backends.cudnn.flags(enabled=False):
                x_BNF, _, _ = torch.lstm(
                    x_BNF, (start, start), weights, True, 1, 0.0, self.training, True, True
                )
        return x_BNF, None
