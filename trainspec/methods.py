"""Training methods: what is trained, which modules it touches, and the rows it adds to the table.

Sources: LoRA, arXiv 2106.09685; target matching, file layout and initial values follow PEFT's LoraConfig.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trainspec.errors import RecipeError
from trainspec.model import ModelSpec
from trainspec.params import Param, UniformFanIn, Zeros, param_table

PEFT_PREFIX = "base_model.model."


class Full(BaseModel):
    """Every weight of the model is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    kind: Literal["full"] = "full"


class LoRA(BaseModel):
    """y = W x + (alpha / rank) B A dropout(x); only A and B are trained.

    `targets` is a list of module names (`q_proj`, or any longer tail of the dotted name), one regular
    expression that must match the whole dotted name, or `all-linear` (every linear layer but the head).
    `adapter` is a PEFT directory to start from; without it A is uniform in ±1/sqrt(in) and B is zero.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    adapter: str | None = None

    @field_validator("targets", mode="before")
    @classmethod
    def _freeze(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @property
    def scale(self) -> float:
        """The factor alpha / rank of the low-rank product."""
        return self.alpha / self.rank


Method = Annotated[Full | LoRA, Field(discriminator="kind")]


def target_modules(model: ModelSpec, method: LoRA) -> tuple[str, ...]:
    """Dotted names of the linear modules that `method` adapts, in the order of the table.

    Raises RecipeError, listing what would match, where a target matches nothing.
    """
    if not method.targets:
        raise RecipeError(
            "method.targets: empty, so nothing would be trained; name modules such as [q_proj, v_proj]"
        )
    linear = {
        p.module: p for p in param_table(model) if p.role in ("linear", "head") and p.name.endswith("weight")
    }
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
    # PEFT's rule for a list: the whole name, or a tail of it that starts at a dot.
    return module == target or module.endswith(f".{target}")


def _matches_nothing(model: ModelSpec, target: str, linear: dict[str, Param]) -> RecipeError:
    would = sorted({m.rsplit(".", 1)[-1] for m in linear})
    return RecipeError(
        f"method.targets: {target!r} matches no linear layer of {model.name}; "
        f"these would match: {', '.join(would)}, all-linear, or a regular expression for a whole name "
        f"such as {next(iter(linear))!r}"
    )


def adapter_table(model: ModelSpec, method: LoRA) -> tuple[Param, ...]:
    """One row per adapter weight, named as PEFT names it in `adapter_model.safetensors`.

    A is (rank, in) and B is (out, rank); each takes its base's axis, `rank` is replicated.
    """
    rows = {p.module: p for p in param_table(model) if p.name.endswith(".weight")}
    table: list[Param] = []
    for module in target_modules(model, method):
        base = rows[module]
        (out_size, in_size), (out_axis, in_axis) = base.shape, base.axes
        for leaf, shape, axes, init in (
            ("lora_A.weight", (method.rank, in_size), ("rank", in_axis), UniformFanIn(in_size)),
            ("lora_B.weight", (out_size, method.rank), (out_axis, "rank"), Zeros()),
        ):
            name = f"{PEFT_PREFIX}{module}.{leaf}"
            table.append(Param(name, shape, axes, init, decay=True, role="adapter", layer=base.layer))
    return tuple(table)


def trainable_table(model: ModelSpec, method: Full | LoRA) -> tuple[Param, ...]:
    """The rows that `method` trains; everything else in the model is frozen."""
    match method:
        case Full():
            return param_table(model)
        case LoRA():
            return adapter_table(model, method)


def full_table(model: ModelSpec, method: Full | LoRA) -> tuple[Param, ...]:
    """Every row of the run: the model's own and, behind them, the method's."""
    match method:
        case Full():
            return param_table(model)
        case LoRA():
            return param_table(model) + adapter_table(model, method)
