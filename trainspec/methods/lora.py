"""LoRA, arXiv 2106.09685, and rank-stabilised, 2312.03732."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from numpy.typing import DTypeLike

from trainspec.errors import RecipeError, WeightsError
from trainspec.families import FAMILIES, family_of
from trainspec.families.family import Family
from trainspec.methods.low_rank import EXAMPLE_TARGETS, LowRank
from trainspec.methods.method import ADAPTER_FILE, PEFT_PREFIX, AdapterFiles, Weights
from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.weight import Array, Index, Weight, WeightLike, stacked


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

    def published_targets(self, model: ModelSpec) -> tuple[str, ...]:
        """See the base class. Raises RecipeError where some of the targets are such names and others are not."""
        known = family_of(model).published_modules
        others = [target for target in self.targets if target not in known]
        if isinstance(self.targets, str) or len(others) == len(self.targets):
            return ()
        if others:
            raise RecipeError(
                f"method.targets: {others[0]!r} beside names of the published code ({', '.join(known)}); an adapter's file "
                "has either these or transformers' names"
            )
        return tuple(name for target in self.targets for name in known[target])

    def tied(self, module: str) -> str:
        """See the base class: the first of the modules that are one in the published code."""
        parent, _, leaf = module.rpartition(".")
        known = self._published.published_modules if self._published else {}
        whole = next((parts for parts in known.values() if leaf in parts), None)
        return f"{parent}.{whole[0]}" if whole else module

    def target_entries(self, base: Param) -> tuple[Param, ...]:
        """See the base class; a part of a fused matrix other than the first has a B alone."""
        a, b = super().target_entries(base)
        return (a, b) if self.tied(base.module) == base.module else (b,)

    def peft_config(self, model: ModelSpec) -> dict[str, Any]:
        """See the base class."""
        config = super().peft_config(model)
        return config | {"target_modules": list(self.targets)} if self._published else config

    def check_peft_config(self, config: Mapping[str, Any], *, directory: Path, model: ModelSpec) -> None:
        """See the base class; names of the published code must be the recipe's."""
        super().check_peft_config(config, directory=directory, model=model)
        theirs, known = config.get("target_modules"), family_of(model).published_modules
        named = sorted(name for name in known if name in theirs) if isinstance(theirs, list) else []
        if named and set(named) != set(self.targets):
            raise WeightsError(
                f"{directory}: target_modules={named} are names of the published code; set method.targets=[{', '.join(named)}]"
            )

    def files(self, weights: Weights) -> dict[str, dict[str, WeightLike]]:
        """See the base class; by the names of the published code the Bs of a fused matrix stand one below the other."""
        if self._published is None:
            return super().files(weights)
        parts: dict[str, list[WeightLike]] = {}
        for name, weight in weights.items():
            parts.setdefault(self._name_in_file(name), []).append(weight)
        return {ADAPTER_FILE: {name: stacked(each) for name, each in parts.items()}}

    def read(
        self, files: AdapterFiles, table: Sequence[Param], *, dtype: DTypeLike
    ) -> Iterator[tuple[Param, Weight]]:
        """See the base class."""
        if self._published is None:
            return super().read(files, table, dtype=dtype)
        stored: dict[str, Param] = {}
        first_row: dict[str, int] = {}
        for param in table:
            name = self._name_in_file(param.name)
            rows = stored[name].shape[0] if name in stored else 0
            first_row[param.name] = rows
            stored[name] = replace(param, name=name, shape=(rows + param.shape[0], *param.shape[1:]))
        found = {param.name: weight for param, weight in files.entries([*stored.values()], dtype=dtype)}
        return (
            (param, _rows(found[self._name_in_file(param.name)], param, first_row[param.name]))
            for param in table
        )

    @property
    def _published(self) -> Family | None:
        """The family whose published code has these targets."""
        if isinstance(self.targets, str) or not self.targets:
            return None
        of = (family for family in FAMILIES.values() if set(self.targets) <= set(family.published_modules))
        return next(of, None)

    def _name_in_file(self, name: str) -> str:
        """The published name of an A or a B."""
        assert self._published is not None
        module, matrix = name.removeprefix(PEFT_PREFIX).split(".lora_")
        stored = self._published.stored(f"{module}.weight").name.removesuffix(".weight")
        return f"{PEFT_PREFIX}{stored}.lora_{matrix}"


def _rows(whole: Weight, param: Param, first: int) -> Weight:
    """The rows of a fused tensor from `first` on that are `param`'s."""
    count = param.shape[0]

    def read(index: Index) -> Array:
        rows, *columns = index
        start, stop, step = rows.indices(count)
        return whole[(slice(start + first, stop + first, step), *columns)]

    return Weight(param.shape, whole.dtype, read)
