"""What the rest of the package asks of a family's torch module: where in it each submodule is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import nn
from transformers import PreTrainedModel

from trainspec.model import ModelSpec


class Anatomy(Protocol):
    """Makes a family's module and finds its submodules. A `model` is what `make` gave, also with a method attached."""

    # The classes of its norms: RMS norms with a `weight`, which compute in float32 whatever their input.
    norms: ClassVar[tuple[type[nn.Module], ...]]

    def make(self, spec: ModelSpec) -> PreTrainedModel:
        """Hugging Face's module, made on the meta device. Its rotary frequencies are not the run's."""
        ...

    def inner(self, model: Any) -> nn.Module:
        """The model without its head."""
        ...

    def embedding(self, model: Any) -> nn.Module:
        """Token ids to the residual stream."""
        ...

    def rotary(self, model: Any) -> nn.Module:
        """The module that makes cos and sin; called with hidden states, for their type, and `position_ids`."""
        ...

    def put_rotary(self, model: Any, rotary: nn.Module) -> None:
        """Replace it by `rotary`."""
        ...

    def layers(self, model: Any) -> Sequence[nn.Module]:
        """The decoder layers, in order."""
        ...

    def attention(self, layer: Any) -> nn.Module:
        """A layer's attention; called with `hidden_states` by keyword, gives a tuple with the output first."""
        ...

    def mlp(self, layer: Any) -> nn.Module:
        """A layer's feed-forward block; called with the hidden states."""
        ...

    def outputs(self, layer: Any) -> dict[str, Any]:
        """The modules of a layer whose output is a point of `points.LAYER_POINTS`, by the point's name."""
        ...

    def inputs(self, layer: Any) -> dict[str, Any]:
        """The modules whose first argument is a point. Rotated queries and keys are the arguments of no module."""
        ...

    def norm(self, model: Any) -> nn.Module:
        """The final norm."""
        ...

    def head(self, model: Any) -> nn.Module:
        """Hidden states to logits."""
        ...
