"""Bottleneck adapters after attention and MLP, before their output is added to the residual stream.

Houlsby and others, arXiv 1902.00751, figure 2. PEFT has no such method. Every tensor peer holds the whole adapter, as it
has the whole residual stream.
"""

# B examples, S sequence, E embed, W bottleneck

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.activations import tap
from torchtrain.families import anatomy_of
from torchtrain.methods.site import Site
from trainspec.methods import Adapter

# torch's gelu is the exact one, with erf.
_ACTIVATIONS: dict[Literal["relu", "gelu", "silu"], Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class Bottleneck(nn.Module):
    """h + up(act(down(h)))."""

    def __init__(self, point: str, embed: int, method: Adapter) -> None:
        super().__init__()
        self._point = point
        self.down = nn.Linear(embed, method.bottleneck)
        self.up = nn.Linear(method.bottleneck, embed)
        self._act = _ACTIVATIONS[method.activation]

    def forward(self, h_BSE: Tensor) -> Tensor:
        """The same shape."""
        hidden_BSW = tap(self._point, self._act(self.down(h_BSE)))
        return h_BSE + self.up(hidden_BSW)


def attach(model: PreTrainedModel, method: Adapter, site: Site) -> None:
    """Add two adapters to each layer of `model`, on the meta device, as children with their canonical names."""
    anatomy = anatomy_of(model)
    for i, layer in enumerate(anatomy.layers(model)):
        for name, block in (
            ("attention_adapter", anatomy.attention(layer)),
            ("mlp_adapter", anatomy.mlp(layer)),
        ):
            with torch.device("meta"):
                adapter = Bottleneck(f"layers.{i}.{name}.hidden", site.spec.embed, method)
            layer.add_module(name, adapter)
            _append(block, adapter)


def _append(block: nn.Module, adapter: nn.Module) -> None:
    """Have the output of `block` go through `adapter`."""

    def adapt(_: nn.Module, __: Any, output: Any) -> Any:
        # Attention returns its weights as well.
        return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)

    block.register_forward_hook(adapt)
