"""LoRA, arXiv 2106.09685, and rank-stabilised, 2312.03732."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from trainspec.methods.low_rank import EXAMPLE_TARGETS, LowRank


class LoRA(LowRank, frozen=True):
    """y = W x + scale B A dropout(x); only A and B are trained. A starts uniform in ±1/sqrt(in), B at zero."""

    kind: Literal["lora"] = "lora"
    """The name of the method."""

    @classmethod
    def examples(cls) -> Mapping[str, Self]:
        """See the base class."""
        return {"lora": cls(rank=4, alpha=8.0, dropout=0.1, targets=EXAMPLE_TARGETS)}

    def plain_settings(self) -> dict[str, tuple[Any, ...]]:
        """See the base class."""
        return {"use_dora": (False,), **super().plain_settings()}
