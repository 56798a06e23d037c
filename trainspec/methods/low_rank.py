"""What methods with a low-rank product share: targets, A and B, and PEFT's LoRA files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from trainspec.errors import RecipeError, WeightsError
from trainspec.methods.adapter_config import check_setting, check_type
from trainspec.methods.method import PEFT_PREFIX, AddedWeights, Count, Rate, Weights
from trainspec.model import ModelSpec
from trainspec.params import Param, UniformFanIn, Zeros, param_table
from trainspec.points import Point
from trainspec.weight import Array

# PEFT's settings under which its LoRA adds A and B alone, with one rank and scale for all targets.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": (None,),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
}

# Attention and MLP; tensor parallelism splits the last by inputs, the others by outputs.
EXAMPLE_TARGETS = ("q_proj", "v_proj", "down_proj")


class LowRank(AddedWeights, frozen=True):
    """The base class: A [rank, in] and B [out, rank] in every target, with `low_rank_scale` as a factor of B A.

    Parts of a fused matrix may have one A (`tied`); the table then has that of the first part only.
    """

    rank: Count = 8
    """The rows of A and the columns of B."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The product B A is scaled by alpha / rank."""
    dropout: Rate = 0.0
    """The dropout rate of A's input."""
    rslora: bool = False
    """Whether to scale by alpha / sqrt(rank) instead (rank-stabilised LoRA, arXiv 2312.03732)."""
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    """The adapted linear layers: a list of module names (the last parts of the dotted name), a regular expression for the
    whole dotted name, or `all-linear` (every one but the head). LoRA of ChatGLM2 also takes the names of its published code,
    such as `query_key_value`, which gives queries, keys and values one A."""

    @field_validator("targets", mode="before")
    @classmethod
    def _freeze(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    def published_targets(self, model: ModelSpec) -> tuple[str, ...]:
        """The table's names of the targets where these are names of the model's published code, else none."""
        return ()

    @property
    def scale(self) -> float:
        """The factor of the low-rank product: alpha / rank, with `rslora` alpha / sqrt(rank)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def low_rank_scale(self) -> float:
        """See the base class."""
        return self.scale

    def table(self, model: ModelSpec) -> tuple[Param, ...]:
        """The entries of every target, one target after the other."""
        base = {p.module: p for p in param_table(model) if p.name.endswith(".weight")}
        return tuple(p for module in target_modules(model, self) for p in self.target_entries(base[module]))

    def tied(self, module: str) -> str:
        """The module whose A is that of `module`, too: itself, but for a part of a fused matrix."""
        return module

    def target_entries(self, base: Param) -> tuple[Param, ...]:
        """A and B of one target, named as in PEFT's files; each has one axis of `base`, and the rank is never split."""
        (out_size, in_size), (out_axis, in_axis) = base.shape, base.axes
        return tuple(
            Param(f"{PEFT_PREFIX}{base.module}.{leaf}", shape, axes, init, True, "adapter", base.layer)
            for leaf, shape, axes, init in (
                ("lora_A.weight", (self.rank, in_size), ("rank", in_axis), UniformFanIn(in_size)),
                ("lora_B.weight", (out_size, self.rank), (out_axis, "rank"), Zeros()),
            )
        )

    def points(self, model: ModelSpec) -> tuple[Point, ...]:
        """At each target A x, and the product as it is added: scale B A x."""
        base = {p.module: p for p in param_table(model) if p.name.endswith(".weight")}
        points: list[Point] = []
        for module in target_modules(model, self):
            target = base[module]
            name = module.rpartition(".")[2]
            points.append(Point(f"{name}.lora_A", ("positions", "rank"), target.layer))
            points.append(Point(f"{name}.lora_B", ("positions", target.axes[0]), target.layer))
        return tuple(points)

    def counts(self) -> dict[str, float]:
        """The rank and the scale."""
        by = "alpha / sqrt(rank)" if self.rslora else "alpha / rank"
        return {"rank": float(self.rank), "sqrt(rank)": self.rank**0.5, by: self.scale}

    def peft_config(self, model: ModelSpec) -> dict[str, Any]:
        """PEFT's LoRA of these targets."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "target_modules": list(target_modules(model, self)),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }

    def check_peft_config(self, config: Mapping[str, Any], *, directory: Path, model: ModelSpec) -> None:
        """See the base class. Settings that have no field must be among `plain_settings`."""
        check_type(directory, config, self, ("LORA",))
        for key, plain in self.plain_settings().items():
            if (config.get(key) or plain[0]) not in plain:
                raise WeightsError(
                    f"{directory}: {key}={config[key]!r} is unsupported: it makes another method"
                )
        config = {**config, "use_rslora": config.get("use_rslora") or False}  # older files do not have it
        for key, field, mine in (
            ("r", "rank", self.rank),
            ("lora_alpha", "alpha", self.alpha),
            ("use_rslora", "rslora", self.rslora),
        ):
            check_setting(directory, config, self, key, mine, field=field)

    def plain_settings(self) -> dict[str, tuple[Any, ...]]:
        """PEFT's settings that have no field, with the values they may have; an absent one means the first."""
        return PLAIN

    @property
    def not_merged(self) -> str | None:
        """It can be merged."""
        return None

    def merged(self, param: Param, weight: Array, trained: Weights, rows: slice = slice(None)) -> Array:
        """The sum of W and the low-rank product where `param` is the weight of a target."""
        names = [
            f"{PEFT_PREFIX}{module}.lora_{x}.weight"
            for x, module in (("A", self.tied(param.module)), ("B", param.module))
        ]
        if not param.name.endswith(".weight") or any(name not in trained for name in names):
            return weight
        a, b = (trained[name] for name in names)
        a, b = a[...].astype(np.float64), b[rows, slice(None)].astype(np.float64)
        return weight.astype(np.float64) + self.scale * (b @ a)


def target_modules(model: ModelSpec, method: LowRank) -> tuple[str, ...]:
    """Dotted names of the linear modules that `method` adapts, in the order of the table.

    Raises RecipeError, with a list of what would match, where a target matches nothing.
    """
    if not method.targets:
        raise RecipeError(
            "method.targets: empty, so nothing would be trained; name modules such as [q_proj, v_proj]"
        )
    linear = {
        p.module: p for p in param_table(model) if p.role in ("linear", "head") and p.name.endswith("weight")
    }
    if published := method.published_targets(model):
        return tuple(m for m in linear if m.rpartition(".")[2] in published)
    if isinstance(method.targets, str):
        if method.targets == "all-linear":
            return tuple(m for m, p in linear.items() if p.role == "linear")
        try:
            pattern = re.compile(method.targets)
        except re.error as error:
            raise RecipeError(
                f"method.targets: {method.targets!r} is not a regular expression: {error}"
            ) from None
        matched = tuple(m for m in linear if pattern.fullmatch(m))
        if not matched and any(_is_tail(method.targets, m) for m in linear):
            raise RecipeError(
                f"method.targets: {method.targets!r} is read as a regular expression for a whole name and matches "
                f"none; for a list of names write [{method.targets}]"
            )
        if not matched:
            raise _matches_nothing(model, method.targets, linear)
        return matched
    for target in method.targets:
        if not any(_is_tail(target, m) for m in linear):
            raise _matches_nothing(model, target, linear)
    return tuple(m for m in linear if any(_is_tail(t, m) for t in method.targets))


def _is_tail(target: str, module: str) -> bool:
    # PEFT's rule for a list: the whole name, or an end of it that starts after a dot.
    return module == target or module.endswith(f".{target}")


def _matches_nothing(model: ModelSpec, target: str, linear: dict[str, Param]) -> RecipeError:
    would = sorted({m.rsplit(".", 1)[-1] for m in linear})
    return RecipeError(
        f"method.targets: {target!r} matches no linear layer of {model.name}; "
        f"these would match: {', '.join(would)}, all-linear, or a regular expression for a whole name "
        f"such as {next(iter(linear))!r}"
    )
