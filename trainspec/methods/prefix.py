"""Prefix tuning, arXiv 2101.00190, and P-tuning v2, 2110.07602.

Source of the projection and of positions: PEFT's PrefixEncoder, and the code and training script published with ChatGLM2-6B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike
from pydantic import model_validator

from trainspec.errors import RecipeError, WeightsError
from trainspec.families import family_of
from trainspec.methods.adapter_config import check_setting, check_type, is_number
from trainspec.methods.entries import linear_entries
from trainspec.methods.method import ADAPTER_CONFIG, AdapterFiles, Arrays, Count, Rate, Weights
from trainspec.methods.virtual_tokens import ENCODER, VirtualTokensFromText, embedding_entry, linear
from trainspec.model import ModelSpec
from trainspec.params import Normal, Param, UniformFanIn, Zeros
from trainspec.points import Point
from trainspec.weight import Array, Weight, WeightLike

# The files that ChatGLM2's training script leaves, the second after `torchtrain convert`, and the module in it.
PUBLISHED_CONFIG, PUBLISHED_FILE = "config.json", "model.safetensors"
PUBLISHED_ENCODER = "transformer.prefix_encoder"
# Settings that tell one model's prefix from another's of the same size, in PEFT's words and in those of the families.
_PEFT_SIZES = {"num_layers": "layers", "num_attention_heads": "kv heads"}
_PUBLISHED_SIZES = {
    **dict.fromkeys(("num_layers", "num_hidden_layers"), "layers"),
    **dict.fromkeys(("multi_query_group_num", "num_key_value_heads"), "kv heads"),
}


class PrefixWidths(NamedTuple):
    """The trained embedding of a virtual token, the middle of its projection, and all keys and values."""

    embedding: int
    hidden: int
    whole: int


class PrefixTuning(VirtualTokensFromText, frozen=True):
    """`virtual_tokens` trained keys and values before every layer's own, visible to all tokens."""

    kind: Literal["prefix"] = "prefix"
    """The name of the method."""
    projection: bool = False
    """Whether Linear-Tanh-Linear makes the keys and values from one embedding per virtual token."""
    projected: Literal["layer", "all_layers"] = "layer"
    """The width of that embedding: that of one layer's keys, as in PEFT, or of all layers' keys and values, as in ChatGLM2."""
    hidden: Count | None = None
    """The width of the projection; null: that of a layer's keys, or with `projected: all_layers` the model's."""
    positions: Literal["after_prefix", "from_zero"] = "after_prefix"
    """The position of the first token: the number of virtual tokens, as in PEFT, or 0, as in ChatGLM2."""
    dropout: Rate = 0.0
    """The dropout rate of the keys and values, for every example by itself; ChatGLM2's is 0.1."""

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
        if self.projected == "all_layers" and not self.projection:
            raise ValueError(
                "method.projected=all_layers: says what is projected; set method.projection=true or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _published(self) -> Self:
        if self.positions == "after_prefix":
            return self
        if self.init == "text":
            raise ValueError(
                "method.init=text: keys of a text stand before the tokens; set method.positions=after_prefix"
            )
        if self.projection and self.projected != "all_layers":
            raise ValueError(
                "method.positions=from_zero: no file has it with PEFT's projection; set method.projected=all_layers"
            )
        if self.hidden is not None:
            raise ValueError(
                f"method.hidden={self.hidden}: with method.positions=from_zero the projection is as wide as the model; leave it out"
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
        """See the base class; a published file has the projection itself."""
        return self.projection and not self.is_published

    @property
    def is_published(self) -> bool:
        """Whether its files are those of ChatGLM2's training script: PEFT has no prefix without positions."""
        return self.positions == "from_zero"

    @property
    def settings_file(self) -> str:
        """See the base class."""
        return PUBLISHED_CONFIG if self.is_published else super().settings_file

    @property
    def weights_file(self) -> str:
        """See the base class."""
        return PUBLISHED_FILE if self.is_published else super().weights_file

    @property
    def position_shift(self) -> int:
        """See the base class."""
        return self.virtual_tokens if self.positions == "after_prefix" else 0

    @property
    def without_encoder(self) -> str:
        """See the base class."""
        return "method.projection=false"

    def table(self, model: ModelSpec) -> tuple[Param, ...]:
        """The keys and values, or the projection and its inputs."""
        axes, widths = ("virtual", "prefix"), self.widths(model)
        if not self.projection:
            return (embedding_entry((self.virtual_tokens, widths.whole), axes, self.embedding_init()),)
        hidden = ("prefix_hidden", widths.hidden)
        last = UniformFanIn(widths.hidden) if self.init == "random" else Zeros()
        return (
            embedding_entry((self.virtual_tokens, widths.embedding), axes, Normal(1.0)),
            *linear_entries(f"{ENCODER}.transform.0", hidden, ("prefix", widths.embedding)),
            *linear_entries(f"{ENCODER}.transform.2", ("prefix", widths.whole), hidden, (last, last)),
        )

    def widths(self, model: ModelSpec) -> PrefixWidths:
        """The widths of the encoder."""
        layer = model.kv_heads * model.head_dim
        whole = 2 * model.layers * layer
        if not self.projection:
            return PrefixWidths(whole, whole, whole)
        if self.projected == "all_layers":
            return PrefixWidths(whole, self.hidden or model.embed, whole)
        return PrefixWidths(layer, self.hidden or layer, whole)

    def points(self, model: ModelSpec) -> tuple[Point, ...]:
        """The keys and values that each layer's attention takes, of every example: they are not rotated."""
        axes, names = ("virtual", "kv_heads", "head_dim"), ("prefix_key", "prefix_value")
        return tuple(Point(name, axes, i) for i in range(model.layers) for name in names)

    def adapter_size(self, model: ModelSpec) -> int:
        """The keys and values, not the projection that makes them; in a published file the projection itself."""
        if self.is_published:
            return sum(param.size for param in self.table(model))
        return self.virtual_tokens * 2 * model.layers * model.kv_heads * model.head_dim

    def encoded(self, weights: Arrays) -> Array:
        """See the base class."""
        x = super().encoded(weights)
        if not self.projection:
            return x
        return linear(weights, "transform.2", np.tanh(linear(weights, "transform.0", x)))

    def adapter_config(self, model: ModelSpec) -> dict[str, Any]:
        """PEFT's settings, or those that ChatGLM2's training script adds to the model's."""
        if not self.is_published:
            return super().adapter_config(model)
        added = {"pre_seq_len": self.virtual_tokens, "prefix_projection": self.projection}
        return family_of(model).config_of(model) | added

    def peft_config(self, model: ModelSpec) -> dict[str, Any]:
        """PEFT's prefix tuning, which counts kv heads. Raises RecipeError for what it does not have."""
        if self.is_published:
            raise RecipeError(
                "method.positions=from_zero: PEFT's prefixes come before the first token; set method.positions=after_prefix, or "
                "take the files as ChatGLM2's code reads them"
            )
        width = model.kv_heads * model.head_dim
        return super().peft_config(model) | {
            "peft_type": "PREFIX_TUNING",
            "token_dim": width,
            "num_attention_heads": model.kv_heads,
            "prefix_projection": self.projection,
            "encoder_hidden_size": self.widths(model).hidden if self.projection else width,
        }

    def check_peft_config(self, config: Mapping[str, Any], *, directory: Path, model: ModelSpec) -> None:
        """See the base class; a prefix of another model may have the same size."""
        mine = family_of(model).config_of(model) if self.is_published else self.peft_config(model)
        if not self.is_published:
            check_type(directory, config, self, ("PREFIX_TUNING",))
        for key, word in (_PUBLISHED_SIZES if self.is_published else _PEFT_SIZES).items():
            theirs = config.get(key)
            if key in mine and (not is_number(theirs) or theirs != mine[key]):
                raise WeightsError(
                    f"{directory}: {key}={theirs}, {model.name} has {mine[key]} {word}; it is another model's"
                )
        if not self.is_published:
            super().check_peft_config(config, directory=directory, model=model)
            return
        check_setting(directory, config, self, "pre_seq_len", self.virtual_tokens, field="virtual_tokens")
        check_setting(directory, config, self, "prefix_projection", self.projection, field="projection")

    def missing_settings(self, directory: Path) -> str:
        """See the base class."""
        other = ADAPTER_CONFIG if self.is_published else PUBLISHED_CONFIG
        if (directory / other).is_file():
            value = "after_prefix" if self.is_published else "from_zero"
            kind = "PEFT" if self.is_published else "ChatGLM2's training script"
            return f"if it is a prefix of {kind}, set method.positions={value}"
        return super().missing_settings(directory)

    def files(self, weights: Weights) -> dict[str, dict[str, WeightLike]]:
        """See the base class; a published file has the trained weights by ChatGLM2's names."""
        if not self.is_published:
            return super().files(weights)
        return {PUBLISHED_FILE: {_published_name(name): weight for name, weight in weights.items()}}

    def read(
        self, files: AdapterFiles, table: Sequence[Param], *, dtype: DTypeLike
    ) -> Iterator[tuple[Param, Weight]]:
        """See the base class."""
        if not self.is_published:
            return super().read(files, table, dtype=dtype)
        stored = files.entries([replace(p, name=_published_name(p.name)) for p in table], dtype=dtype)
        return ((param, weight) for param, (_, weight) in zip(table, stored, strict=True))

    @property
    def not_merged(self) -> str | None:
        """See the base class."""
        return "cannot be merged: no weight of the model makes its keys and values"


def dropout_name(layer: int, which: str) -> str:
    """The name by which the masks of a layer's keys (`key`) or values (`value`) are drawn."""
    return f"{ENCODER}.{layer}.{which}"


def _published_name(name: str) -> str:
    """`transformer.prefix_encoder.embedding.weight`, and `trans` for the projection."""
    return name.replace(f"{ENCODER}.transform.", f"{PUBLISHED_ENCODER}.trans.").replace(
        f"{ENCODER}.embedding.", f"{PUBLISHED_ENCODER}.embedding."
    )
