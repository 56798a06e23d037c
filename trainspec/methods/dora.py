"""DoRA, arXiv 2402.09353: LoRA on the direction of each row of a weight, whose norm is trained separately."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import DTypeLike

from trainspec.errors import WeightsError
from trainspec.methods.low_rank import EXAMPLE_TARGETS, LowRank
from trainspec.methods.method import ADAPTER_FILE, PEFT_PREFIX, AdapterFiles, Weights
from trainspec.model import ModelSpec
from trainspec.params import FromWeights, Param
from trainspec.weight import Array, Weight, WeightLike

# PEFT's module; its files leave out the last part of the parameter's name.
MAGNITUDE = "lora_magnitude_vector"


class DoRA(LowRank, frozen=True):
    """y = m / n (W x + scale B A x) + bias, n the norm of each row of W + scale B A; m, A and B are trained.

    The gradient treats n as a constant (section 4.3 of the paper). m starts as n. Dropout is PEFT's: it applies to the
    input of A and to the term that m / n - 1 multiplies, not to W x itself.
    """

    kind: Literal["dora"] = "dora"
    """The name of the method."""

    @classmethod
    def examples(cls) -> Mapping[str, Self]:
        """See the base class."""
        return {"dora": cls(rank=4, alpha=8.0, dropout=0.1, targets=EXAMPLE_TARGETS)}

    def target_entries(self, base: Param) -> tuple[Param, ...]:
        """A, B and m, which has the axis of the base's outputs. Like everything with one dimension, m does not decay."""
        a, b = super().target_entries(base)
        start = FromWeights((base.name, a.name, b.name), self.row_norms)
        name = f"{PEFT_PREFIX}{base.module}.{MAGNITUDE}.weight"
        return a, b, Param(name, base.shape[:1], base.axes[:1], start, False, "adapter", base.layer)

    def row_norms(self, weight: Array, a: Array, b: Array) -> Array:
        """The norm of each row of W + scale B A: the paper's ||.||_c, whose W is the transpose."""
        return np.linalg.norm(weight + self.scale * (b @ a), axis=1)

    def peft_config(self, model: ModelSpec) -> dict[str, Any]:
        """PEFT's LoRA with `use_dora`."""
        return super().peft_config(model) | {"use_dora": True}

    def check_peft_config(self, config: Mapping[str, Any], *, directory: Path, model: ModelSpec) -> None:
        """See the base class."""
        super().check_peft_config(config, directory=directory, model=model)
        if not config.get("use_dora"):
            raise WeightsError(f"{directory}: use_dora is not set, so it is LoRA's; set method.kind=lora")

    def files(self, weights: Weights) -> dict[str, dict[str, WeightLike]]:
        """A, B and m by PEFT's names."""
        return {ADAPTER_FILE: {_name_in_file(name): weight for name, weight in weights.items()}}

    def read(
        self, files: AdapterFiles, table: Sequence[Param], *, dtype: DTypeLike
    ) -> Iterator[tuple[Param, Weight]]:
        """See the base class."""
        stored = files.entries([replace(p, name=_name_in_file(p.name)) for p in table], dtype=dtype)
        return ((param, weight) for param, (_, weight) in zip(table, stored, strict=True))

    def merged(self, param: Param, weight: Array, trained: Weights, rows: slice = slice(None)) -> Array:
        """m / n (W + scale B A) where `param` is the weight of a target."""
        m = trained.get(f"{PEFT_PREFIX}{param.module}.{MAGNITUDE}.weight")
        if m is None or not param.name.endswith(".weight"):
            return weight
        whole = super().merged(param, weight, trained, rows)
        return (m[(rows,)].astype(np.float64) / np.linalg.norm(whole, axis=1))[:, None] * whole


def _name_in_file(name: str) -> str:
    return name.removesuffix(".weight") if name.endswith(f".{MAGNITUDE}.weight") else name
