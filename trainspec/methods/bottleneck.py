"""Bottleneck adapters, arXiv 1902.00751. PEFT has no such method, so the files are twintrain's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from trainspec.errors import WeightsError
from trainspec.methods.adapter_config import check_setting, check_type
from trainspec.methods.entries import linear_entries
from trainspec.methods.method import AddedWeights, Count
from trainspec.model import ModelSpec
from trainspec.params import Param, UniformFanIn, Zeros
from trainspec.points import Point

# In place of PEFT's types.
BOTTLENECK = "TWINTRAIN_BOTTLENECK"
FORMAT = 1


class Adapter(AddedWeights, frozen=True):
    """h + up(act(down(h))) on what attention and what the MLP add to the residual stream, in every layer.

    `up` and the biases start at zero, so that the model starts unchanged.
    """

    kind: Literal["adapter"] = "adapter"
    """The name of the method."""
    bottleneck: Count = 64
    """The width between `down` and `up`."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """The function between `down` and `up`; gelu is the exact one, without tanh."""

    @classmethod
    def examples(cls) -> Mapping[str, Self]:
        """See the base class."""
        return {"adapter": cls(bottleneck=8, activation="gelu")}

    def table(self, model: ModelSpec) -> tuple[Param, ...]:
        """Two linear layers after attention and two after the MLP, in every layer."""
        embed, width = ("embed", model.embed), ("bottleneck", self.bottleneck)
        table: list[Param] = []
        for i in range(model.layers):
            for module in ("attention_adapter", "mlp_adapter"):
                base = f"model.layers.{i}.{module}"
                down = (UniformFanIn(model.embed), Zeros())
                table += linear_entries(f"{base}.down", width, embed, down, layer=i)
                table += linear_entries(f"{base}.up", embed, width, (Zeros(), Zeros()), layer=i)
        return tuple(table)

    def points(self, model: ModelSpec) -> tuple[Point, ...]:
        """What `up` takes: the activation of the bottleneck, after attention and after the MLP."""
        names = [f"{module}.hidden" for module in ("attention_adapter", "mlp_adapter")]
        return tuple(
            Point(name, ("positions", "bottleneck"), i) for i in range(model.layers) for name in names
        )

    def counts(self) -> dict[str, float]:
        """The width."""
        return {"bottleneck": float(self.bottleneck)}

    def peft_config(self, model: ModelSpec) -> dict[str, Any]:
        """Twintrain's own settings, under the name of PEFT's file."""
        return {
            "peft_type": BOTTLENECK,
            "format": FORMAT,
            "bottleneck": self.bottleneck,
            "activation": self.activation,
            "num_layers": model.layers,
            "token_dim": model.embed,
        }

    def check_peft_config(self, config: Mapping[str, Any], *, directory: Path, model: ModelSpec) -> None:
        """See the base class."""
        check_type(directory, config, self, (BOTTLENECK,))
        if config.get("format") != FORMAT:
            raise WeightsError(
                f"{directory}: format {config.get('format')} of {BOTTLENECK}; this twintrain reads {FORMAT}"
            )
        check_setting(directory, config, self, "bottleneck", self.bottleneck)
        check_setting(directory, config, self, "activation", self.activation)

    @property
    def not_merged(self) -> str | None:
        """See the base class."""
        return "cannot be merged: there is a non-linearity between its two matrices"
