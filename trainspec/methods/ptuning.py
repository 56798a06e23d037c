"""P-tuning, arXiv 2103.10385. Source of the encoder: PEFT's PromptEncoder; the LSTM's equations are torch.nn.LSTM's."""

# V virtual tokens, I inputs of a layer, H hidden width

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import model_validator

from trainspec.methods.adapter_config import check_setting, check_type
from trainspec.methods.entries import linear_entries
from trainspec.methods.method import Arrays, Count, Rate
from trainspec.methods.virtual_tokens import ENCODER, VirtualTokens, embedding_entry, linear
from trainspec.model import ModelSpec
from trainspec.numpy_layers import sigmoid
from trainspec.params import Normal, Param, UniformFanIn
from trainspec.weight import Array

# PEFT's default.
LSTM_LAYERS = 2


class PTuning(VirtualTokens, frozen=True):
    """Prompt tuning whose embeddings an encoder makes from trained ones.

    `adapter` must hold the encoder as well (docs/adapter-files.md).
    """

    kind: Literal["ptuning"] = "ptuning"
    """The name of the method."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """`mlp` is Linear-ReLU-Linear-ReLU-Linear, `lstm` two bidirectional layers and then Linear-ReLU-Linear."""
    hidden: Count | None = None
    """The width of the encoder; null: that of the model."""
    dropout: Rate = 0.0
    """The dropout rate between the layers of the LSTM."""

    @model_validator(mode="after")
    def _has_dropout(self) -> Self:
        if self.dropout and self.encoder != "lstm":
            raise ValueError(
                f"method.dropout={self.dropout}: only P-tuning's LSTM has dropout; leave it out or set "
                "method.encoder=lstm"
            )
        return self

    @classmethod
    def examples(cls) -> Mapping[str, Self]:
        """See the base class."""
        return {
            "ptuning-mlp": cls(virtual_tokens=3, encoder="mlp", hidden=16),
            "ptuning-lstm": cls(virtual_tokens=3, encoder="lstm", hidden=8, dropout=0.1),
        }

    @property
    def leading_positions(self) -> int:
        """See the base class."""
        return self.virtual_tokens

    @property
    def has_encoder(self) -> bool:
        """See the base class."""
        return True

    @property
    def without_encoder(self) -> str:
        """See the base class."""
        return "method.kind=prompt"

    def table(self, model: ModelSpec) -> tuple[Param, ...]:
        """The encoder and its inputs."""
        embed, hidden = ("embed", model.embed), ("hidden", self.hidden or model.embed)
        first = embedding_entry((self.virtual_tokens, model.embed), ("virtual", "embed"), Normal(1.0))
        if self.encoder == "mlp":
            sizes = (embed, hidden, hidden, embed)
            layers = (
                linear_entries(f"{ENCODER}.mlp_head.{2 * i}", outer, inner)
                for i, (inner, outer) in enumerate(pairwise(sizes))
            )
            return (first, *(param for layer in layers for param in layer))
        both = ("hidden", 2 * hidden[1])
        return (
            first,
            *_lstm_entries(embed, hidden[1]),
            *linear_entries(f"{ENCODER}.mlp_head.0", both, both),
            *linear_entries(f"{ENCODER}.mlp_head.2", embed, both),
        )

    def adapter_size(self, model: ModelSpec) -> int:
        """The embeddings, not the encoder that makes them."""
        return self.virtual_tokens * model.embed

    def encoded(self, weights: Arrays) -> Array:
        """See the base class."""
        x = super().encoded(weights)
        if self.encoder == "mlp":
            x = np.maximum(linear(weights, "mlp_head.0", x), 0)
            x = np.maximum(linear(weights, "mlp_head.2", x), 0)
            return linear(weights, "mlp_head.4", x)
        for layer in range(LSTM_LAYERS):
            backwards = _lstm(weights, f"l{layer}_reverse", x[::-1])[::-1]
            x = np.concatenate([_lstm(weights, f"l{layer}", x), backwards], axis=-1)
        return linear(weights, "mlp_head.2", np.maximum(linear(weights, "mlp_head.0", x), 0))

    def peft_config(self, model: ModelSpec) -> dict[str, Any]:
        """PEFT's P-tuning."""
        return super().peft_config(model) | {
            "peft_type": "P_TUNING",
            "encoder_reparameterization_type": self.encoder.upper(),
            "encoder_hidden_size": self.hidden or model.embed,
            "encoder_num_layers": LSTM_LAYERS,
            "encoder_dropout": self.dropout,
        }

    def check_peft_config(self, config: Mapping[str, Any], *, directory: Path, model: ModelSpec) -> None:
        """See the base class."""
        check_type(directory, config, self, ("P_TUNING",))
        kind = self.encoder.upper()
        check_setting(directory, config, self, "encoder_reparameterization_type", kind, field="encoder")
        super().check_peft_config(config, directory=directory, model=model)

    @property
    def not_merged(self) -> str | None:
        """See the base class."""
        return "cannot be merged: its embeddings are in the input, not in a weight"


def _lstm_entries(embed: tuple[str, int], hidden: int) -> list[Param]:
    """Both directions of every layer; the four gates are concatenated along the first dimension."""
    entries = []
    for layer in range(LSTM_LAYERS):
        axis, size = embed if layer == 0 else ("hidden", 2 * hidden)
        for way in ("", "_reverse"):
            for leaf, shape, axes in (
                ("weight_ih", (4 * hidden, size), ("hidden", axis)),
                ("weight_hh", (4 * hidden, hidden), ("hidden", "hidden")),
                ("bias_ih", (4 * hidden,), ("hidden",)),
                ("bias_hh", (4 * hidden,), ("hidden",)),
            ):
                name, is_bias = f"{ENCODER}.lstm_head.{leaf}_l{layer}{way}", leaf.startswith("bias")
                entries.append(Param(name, shape, axes, UniformFanIn(hidden), not is_bias, "adapter"))
    return entries


def _lstm(weights: Arrays, which: str, x_VI: Array) -> Array:
    """One direction of one layer, [V, H]; gates in torch's order: input, forget, cell, output."""
    of_input, of_state, bias_input, bias_state = (
        weights[f"{ENCODER}.lstm_head.{leaf}_{which}"]
        for leaf in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden = cell = np.zeros(of_state.shape[1])
    outputs = []
    for x_I in x_VI:
        gates = of_input @ x_I + bias_input + of_state @ hidden + bias_state
        i, f, g, o = np.split(gates, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        outputs.append(hidden)
    return np.stack(outputs)
