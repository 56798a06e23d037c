"""Prefix tuning, arXiv 2101.00190, and P-tuning v2, 2110.07602. Source of the projection: PEFT's PrefixEncoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import model_validator

from trainspec.errors import WeightsError
from trainspec.methods.adapter_config import check_type, is_number
from trainspec.methods.entries import linear_entries
from trainspec.methods.method import Arrays, Count
from trainspec.methods.virtual_tokens import ENCODER, VirtualTokensFromText, embedding_entry, linear
from trainspec.model import ModelSpec
from trainspec.params import Normal, Param, UniformFanIn, Zeros
from trainspec.points import Point
from trainspec.weight import Array


class PrefixTuning(VirtualTokensFromText, frozen=True):
    """`virtual_tokens` trained keys and values before every layer's own, visible to all tokens."""

    kind: Literal["prefix"] = "prefix"
    """The name of the method."""
    projection: bool = False
    """Whether Linear-Tanh-Linear makes the keys and values from one embedding per virtual token."""
    hidden: Count | None = None
    """The width of the projection; null: that of a layer's keys."""

    @model_validator(mode="after")
    def _projectable(self) -> Self:
        if self.init == "text" and self.projection:
            raise ValueError(
                "method.init=text: a projection cannot be made to give the text's keys and values; set method.projection=false"
            )
        if self.hidden is not None and not self.projection:
            raise ValueError(
                f"method.hidden={self.hidden}: is the width of a projection; set method.projection=true or leave it out"
            )
        return self

    @classmethod
    def examples(cls) -> Mapping[str, Self]:
        """See the base class."""
        return {
            "prefix": cls(virtual_tokens=3),
            "prefix-projection": cls(virtual_tokens=3, projection=True, hidden=16),
        }

    @property
    def has_encoder(self) -> bool:
        """See the base class."""
        return self.projection

    @property
    def without_encoder(self) -> str:
        """See the base class."""
        return "method.projection=false"

    def table(self, model: ModelSpec) -> tuple[Param, ...]:
        """The keys and values, or the projection and its inputs."""
        width = model.kv_heads * model.head_dim
        whole = ("prefix", 2 * model.layers * width)
        axes = ("virtual", "prefix")
        if not self.projection:
            return (embedding_entry((self.virtual_tokens, whole[1]), axes, self.embedding_init()),)
        hidden = ("prefix_hidden", self.hidden or width)
        last = UniformFanIn(hidden[1]) if self.init == "random" else Zeros()
        return (
            embedding_entry((self.virtual_tokens, width), axes, Normal(1.0)),
            *linear_entries(f"{ENCODER}.transform.0", hidden, ("prefix", width)),
            *linear_entries(f"{ENCODER}.transform.2", whole, hidden, (last, last)),
        )

    def points(self, model: ModelSpec) -> tuple[Point, ...]:
        """The keys and values that each layer's attention takes, of every example: they are not rotated."""
        axes, names = ("virtual", "kv_heads", "head_dim"), ("prefix_key", "prefix_value")
        return tuple(Point(name, axes, i) for i in range(model.layers) for name in names)

    def adapter_size(self, model: ModelSpec) -> int:
        """The keys and values, not the projection that makes them."""
        return self.virtual_tokens * 2 * model.layers * model.kv_heads * model.head_dim

    def encoded(self, weights: Arrays) -> Array:
        """See the base class."""
        x = super().encoded(weights)
        if not self.projection:
            return x
        return linear(weights, "transform.2", np.tanh(linear(weights, "transform.0", x)))

    def peft_config(self, model: ModelSpec) -> dict[str, Any]:
        """PEFT's prefix tuning, which counts kv heads."""
        width = model.kv_heads * model.head_dim
        return super().peft_config(model) | {
            "peft_type": "PREFIX_TUNING",
            "token_dim": width,
            "num_attention_heads": model.kv_heads,
            "prefix_projection": self.projection,
            "encoder_hidden_size": self.hidden or width,
        }

    def check_peft_config(self, config: Mapping[str, Any], *, directory: Path, model: ModelSpec) -> None:
        """See the base class; a prefix of another model may have the same size."""
        check_type(directory, config, self, ("PREFIX_TUNING",))
        for key, mine, word in (
            ("num_layers", model.layers, "layers"),
            ("num_attention_heads", model.kv_heads, "kv heads"),
        ):
            theirs = config.get(key)
            if not is_number(theirs) or theirs != mine:
                raise WeightsError(
                    f"{directory}: {key}={theirs}, {model.name} has {mine} {word}; it is another model's"
                )
        super().check_peft_config(config, directory=directory, model=model)

    @property
    def not_merged(self) -> str | None:
        """See the base class."""
        return "cannot be merged: no weight of the model makes its keys and values"
