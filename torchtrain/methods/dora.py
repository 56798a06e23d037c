"""DoRA: PEFT's layers, with a variant of its own arithmetic for layers that are split over tensor peers."""

# B examples, S sequence, I inputs, O outputs, R rank; where a layer is split, those of this process

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.mesh import Peers
from torchtrain.methods.low_rank import replace_targets
from torchtrain.methods.site import Site
from torchtrain.precision import accumulation_dtype
from torchtrain.tensor_parallel import RowLinear
from trainspec.methods import DoRA

_ALONE = Peers()
Norms = dict[nn.Module, Tensor]
_known: ContextVar[Norms | None] = ContextVar("norms that are computed once", default=None)


@contextmanager
def computed_once(norms: Norms) -> Iterator[None]:
    """While weights stay as they are: each `Magnitude` puts its norms into `norms`, and takes them from there."""
    token = _known.set(norms)
    try:
        yield
    finally:
        _known.reset(token)


class Magnitude(nn.Module):
    """m (u + s B A d) / n, where n, the norms of the rows of W + s B A, has no gradient."""

    def __init__(self, base: nn.Linear, *, tensor: Peers) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(base.out_features, device="meta"))
        # A row of a row layer is spread over all peers, one of a column layer is on a single one.
        self._peers = tensor if isinstance(base, RowLinear) else _ALONE

    def forward(self, direction_BSO: Tensor, weight_OI: Tensor, product_OI: Tensor | None) -> Tensor:
        """Without the product s B A the norms are those that are known."""
        known = _known.get()
        if product_OI is None:
            assert known is not None, "needed unless norms are known"
            return self.weight * (direction_BSO / known[self])
        norms_O = self._norms(weight_OI, product_OI)
        if known is not None:
            known[self] = norms_O
        return self.weight * (direction_BSO / norms_O)

    def has_norms(self) -> bool:
        """Whether its norms are known."""
        known = _known.get()
        return known is not None and self in known

    @torch.no_grad()
    def _norms(self, weight_OI: Tensor, product_OI: Tensor) -> Tensor:
        squares_O = (weight_OI.to(product_OI.dtype) + product_OI).square().sum(1)
        return self._peers.sum_(squares_O).sqrt()


class _Variant(LoraVariant):
    """PEFT's DoraLinearVariant: without dropout W x is computed once; with dropout, u and d are of dropout(x)."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """`result`, which is W x + bias, plus the change; that is a small difference, taken in the accumulation type."""
        base, dropout = module.get_base_layer(), module.lora_dropout[active_adapter]
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale, dtype = module.scaling[active_adapter], accumulation_dtype(x.dtype)
        drops = module.training and not isinstance(dropout, nn.Identity)
        dropped_BSI = dropout(x) if drops else x
        plain_BSO = (base(dropped_BSI) if drops else result).to(dtype)
        if base.bias is not None:
            plain_BSO = plain_BSO - base.bias
        magnitude, product_OI = module.lora_magnitude_vector[active_adapter], None
        if not magnitude.has_norms():
            with torch.no_grad():
                product_OI = scale * (b.weight.to(dtype) @ a.weight.to(dtype))
        direction_BSO = plain_BSO + scale * b(a(dropped_BSI)).to(dtype)
        scaled_BSO = magnitude(direction_BSO, base.weight, product_OI)
        return result + (scaled_BSO - plain_BSO).to(result.dtype)


def attach(model: PreTrainedModel, method: DoRA, site: Site) -> None:
    """Replace each target by PEFT's layer, with a magnitude on the meta device."""
    for layer in replace_targets(model, method, site):
        base = layer.get_base_layer()
        assert isinstance(base, nn.Linear)
        (name,) = layer.lora_A
        layer.lora_magnitude_vector[name] = Magnitude(base, tensor=site.tensor)
        layer.lora_variant[name] = _Variant()
