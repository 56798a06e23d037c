"""What replaces a family's own in its torch module: norms in float64, rotary tables, the mask."""

# B examples, S sequence, T positions of a layer, P keys of a prefix, X = P + T keys, D rotated elements of a head

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchtrain.mesh import compute_device
from trainspec.model import ModelSpec
from trainspec.rope import inverse_frequencies, table_factor

# The segment of virtual tokens in front, which every query sees.
VIRTUAL = -1


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x²) + eps) * weight, computed in the type of x; Hugging Face's computes in float32."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(mean_square + self.variance_epsilon))


class TiedLinear(nn.Module):
    """Another linear layer, which has the weight: its gradient is the sum of both uses."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self._source = (source,)  # in a tuple, so that its weight is no second parameter

    @property
    def source(self) -> nn.Module:
        """The layer that has the weight."""
        return self._source[0]

    @property
    def weight(self) -> Tensor:
        """That layer's weight."""
        return self.source.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        return self.source(x)


class RotaryTables(nn.Module):
    """cos and sin [B, S, D] of each position's angles, made in `dtype` (float32 or float64), cast to the type of x.

    Hugging Face's frequencies are a float32 buffer, which a cast of the model rounds.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        numpy_dtype = "float64" if dtype == torch.float64 else "float32"
        self._inverse = torch.from_numpy(inverse_frequencies(spec, numpy_dtype)).to(compute_device())

    @torch.no_grad()
    def forward(self, x_BSE: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].to(self._inverse.dtype) * self._inverse
        angles_BSD = torch.cat((angles, angles), dim=-1)
        return angles_BSD.cos().to(x_BSE.dtype), angles_BSD.sin().to(x_BSE.dtype)


class ScaledRotaryTables(RotaryTables):
    """The same, multiplied by a factor (YaRN's) before they are cast."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__(spec, dtype)
        self._factor = table_factor(spec)

    @torch.no_grad()
    def forward(self, x_BSE: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super().forward(x_BSE.new_empty(0, dtype=self._inverse.dtype), position_ids)
        return (cos * self._factor).to(x_BSE.dtype), (sin * self._factor).to(x_BSE.dtype)


def rotary_tables(spec: ModelSpec, dtype: torch.dtype) -> RotaryTables:
    """The tables of a model, made in `dtype`."""
    return RotaryTables(spec, dtype) if table_factor(spec) == 1 else ScaledRotaryTables(spec, dtype)


def attention_mask(segments_BS: Tensor) -> Tensor:
    """True [B, S, S] where a query sees a key: at or before itself, of its own segment or a virtual token.

    Padding (segment 0) sees padding, so no row of the softmax is empty.
    """
    is_own = segments_BS[:, :, None] == segments_BS[:, None, :]
    is_virtual = segments_BS[:, None, :] == VIRTUAL
    return (is_own | is_virtual).tril()


def in_window(mask_BTX: Tensor, positions_BT: Tensor, window: int) -> Tensor:
    """`mask_BTX` [B, T, P + T] where a key's position is less than `window` before the query's.

    Keys before those of the T positions are a prefix, at positions 0, 1, ...
    """
    prefix_P = torch.arange(mask_BTX.shape[-1] - positions_BT.shape[1], device=positions_BT.device)
    keys_BX = torch.cat((prefix_P.expand(len(positions_BT), -1), positions_BT), 1)
    distance_BTX = positions_BT[:, :, None] - keys_BX[:, None, :]
    return mask_BTX & (distance_BTX < window)
