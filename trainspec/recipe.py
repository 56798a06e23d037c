"""The Recipe: one frozen tree that says what to train. YAML in, `--set a.b=c` on top, checked at birth."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from trainspec.complaint import LARGEST, complaint, shown
from trainspec.errors import RecipeError
from trainspec.methods import LoRA, Method
from trainspec.plans.plan import Plan, Policy
from trainspec.recipe_file import read_tree
from trainspec.schedule import Schedule
from trainspec.text.records import DATE, Task

Positive = Annotated[int, Field(ge=1)]
# A file, a directory or `hub:ORG/NAME`.
Source = Annotated[str, Field(min_length=1)]
DEFAULT_STEPS = 200


class Section(BaseModel):
    """A part of the recipe: frozen, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, populate_by_name=True, allow_inf_nan=False
    )


class ModelSource(Section):
    """Where the model comes from: a Hugging Face directory, a hub id, or `preset:NAME` (random weights only)."""

    from_: Annotated[Source, Field(alias="from")]
    weights: Literal["pretrained", "random"] = "pretrained"


def _as_pairs(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping such as {{instruction: question}}, not {shown(value)}")
    for pair in value.items():
        for name in pair:
            if not isinstance(name, str):
                raise ValueError(
                    f"maps a field's name to a field's name; {shown(name)} is no text: write it in quotes"
                )
    return tuple(sorted(value.items()))


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_date(value: Any) -> Any:
    # YAML makes a date of an unquoted one; a quoted one is text.
    try:
        return datetime.date.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"{shown(value)} is no date; write one such as 2024-07-26") from None


# Written as a mapping, kept as sorted pairs: a recipe is frozen and hashable.
Columns = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(_as_pairs),
    PlainSerializer(dict, return_type=dict[str, str]),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class Data(Section):
    """Records, how they become tokens, and how they fill rows of `sequence_tokens`.

    `train` and `heldout` name a file or `hub:ORG/NAME[:SPLIT]`. `columns` says which field of a record stands for which
    of ours (`{instruction: question}`), `ignore` which fields are not used. `tokenizer` is a directory, the model's own by
    default; `chat_template` a jinja file that takes the place of the tokenizer's; `system` a system message for the
    conversations that have none; `date` what a template is told is today.
    `loss_on: completion` counts the response (and its end token) only; `all` counts the prompt as well.
    `too_long` says what happens to a record that does not fit a row: it is skipped, cut at the row's end, or
    split over several rows. `bad_records` says whether malformed records stop the run or are skipped. What is skipped,
    cut or split is counted and reported.
    """

    train: Source
    heldout: Source | None = None
    task: Task = "question_answering"
    columns: Columns = ()
    ignore: Names = ()
    bad_records: Literal["stop", "skip"] = "stop"
    tokenizer: Source | None = None
    chat_template: Source | None = None
    system: str | None = None
    date: Annotated[datetime.date, BeforeValidator(_as_date)] = DATE
    sequence_tokens: Positive = 256
    packing: bool = False
    padding_side: Literal["right", "left"] = "right"
    loss_on: Literal["completion", "all"] = "completion"
    too_long: Literal["skip", "cut", "split"] = "skip"
    cache: Source = "build/cache"


class Batch(Section):
    """Rows per update over all devices, and into how many microbatches they are split one after another."""

    global_examples: Positive = 16
    accumulation: Positive = 1

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.global_examples % self.accumulation:
            raise ValueError(
                f"batch.accumulation={self.accumulation} does not divide batch.global_examples={self.global_examples}"
            )
        return self


class Precision(Section):
    """What is stored and computed (`policy`) and in which type gradients are summed over devices (`reduce`).

    `reduce` is float64 in fp64 runs and else float32 where it is not given.
    """

    policy: Policy = "fp32"
    reduce: Policy = "fp32"

    @model_validator(mode="before")
    @classmethod
    def _default_reduce(cls, value: Any) -> Any:
        if isinstance(value, dict) and "reduce" not in value and value.get("policy") == "fp64":
            return value | {"reduce": "fp64"}
        return value

    @model_validator(mode="after")
    def _reducible(self) -> Self:
        allowed = {"fp64": ("fp64",), "fp32": ("fp32",), "bf16": ("bf16", "fp32")}[self.policy]
        if self.reduce not in allowed:
            raise ValueError(f"precision.reduce={self.reduce} does not go with precision.policy={self.policy}; "
                             f"use {' or '.join(allowed)}")  # fmt: skip
        return self


class AdamW(Section):
    """Decoupled AdamW (arXiv 1711.05101) and the global-norm clip; `clip_norm: null` means no clipping."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0

    @model_validator(mode="before")
    @classmethod
    def _freeze(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("betas"), list):
            return value | {"betas": tuple(value["betas"])}
        return value

    @field_validator("clip_norm", mode="before")
    @classmethod
    def _not_off(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise ValueError(
                f"{shown(value)} is no length to clip a gradient to; for no clipping write optimizer.clip_norm=null"
            )
        return value


class Checkpoint(Section):
    """How often the training state is saved, and how many of the newest are kept."""

    every_steps: Positive = 50
    keep: Positive = 2


@dataclass(frozen=True)
class Span:
    """How long a run is: its schedule spans `steps` updates, it ends after update `last`."""

    steps: int
    last: int
    epochs: float | None

    def said(self, *, rows: int | None, examples: int) -> str:
        """The length in updates and in epochs of `rows` rows (None: not counted), `examples` an update."""
        stop = "" if self.last == self.steps else f", of which this run makes {self.last}"
        if self.epochs is not None:
            return f"{_epochs(self.epochs)} of {rows} rows: {self.steps} updates{stop}"
        if rows is None:
            return f"{self.steps} updates{stop}"
        return f"{self.steps} updates: {_epochs(self.steps * examples / rows)} of {rows} rows{stop}"


def _epochs(number: float) -> str:
    return f"{number:.4g} epoch{'' if number == 1 else 's'}"


class Run(Section):
    """How long to train, from which seed, and how often to measure the held-out loss.

    The schedule spans `steps` updates (200 by default), or `epochs` passes over the rows, which need not be whole;
    `stop_after_steps` ends a run earlier without changing it. Both need the rows to mean something: `Recipe.span`.
    """

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    stop_after_steps: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    eval_every_steps: Positive = 50

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("steps") is None and value.get("epochs") is None:
            return value | {"steps": DEFAULT_STEPS}
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"run.steps={self.steps} and run.epochs={self.epochs:g}: give one of them and set the other to null"
            )
        return self


class Recipe(Section):
    """Everything that defines a training run; equal recipes give equal runs on every backend."""

    model: ModelSource
    method: Method = LoRA()
    data: Data
    batch: Batch = Batch()
    plan: Plan = Plan()
    precision: Precision = Precision()
    optimizer: AdamW = AdamW()
    schedule: Schedule = Schedule()
    checkpoint: Checkpoint = Checkpoint()
    run: Run = Run()

    @model_validator(mode="before")
    @classmethod
    def _default_kind(cls, value: Any) -> Any:
        method = value.get("method") if isinstance(value, dict) else None
        if isinstance(method, dict) and "kind" not in method:
            return value | {"method": {"kind": LoRA().kind} | method}
        return value

    def span(self, rows: Callable[[], int]) -> Span:
        """How long the run is; `rows` is asked for the dataset's where that depends on them."""
        run, steps = self.run, self.run.steps
        if steps is None:
            # As the user wrote it: 1.1 epochs of 100 rows are 110 of them, and in floating point a little more.
            seen = Fraction(str(run.epochs)) * rows()
            steps = math.ceil(seen / self.batch.global_examples)
            if steps > LARGEST:
                raise RecipeError(
                    f"run.epochs={run.epochs:g}: more updates than can be counted; give less, or run.steps"
                )
        return Span(steps, min(steps, run.stop_after_steps or steps), run.epochs)

    def spanning(self, span: Span) -> Recipe:
        """The recipe with its number of updates in place of its epochs."""
        return self.model_copy(
            update={"run": self.run.model_copy(update={"steps": span.steps, "epochs": None})}
        )

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; `load_recipe` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False)


def idle_settings(recipe: Recipe, span: Span) -> list[str]:
    """A line for every setting that has no effect in this recipe."""
    plan, schedule = recipe.plan, recipe.schedule
    lines = []
    if plan.pipe == 1 and _is_set(plan, "schedule"):
        lines.append(f"no effect: plan.schedule={plan.schedule}: there is no pipeline with plan.pipe=1")
    if _is_set(plan, "chunks") and not (plan.pipe > 1 and plan.schedule == "interleaved"):
        lines.append(
            f"no effect: plan.chunks={plan.chunks}: only a pipeline of plan.schedule=interleaved has chunks"
        )
    if schedule.kind == "constant" and _is_set(schedule, "final_ratio"):
        lines.append(
            f"no effect: schedule.final_ratio={schedule.final_ratio:g}: schedule.kind=constant has no decay"
        )
    warmup = schedule.warmup(span.steps)
    if warmup >= span.steps:
        lines.append(
            f"the rate never reaches its peak: the warm-up takes {warmup} of the schedule's {span.steps} updates"
        )
    return lines


def _is_set(section: BaseModel, name: str) -> bool:
    """Whether a setting differs from its default. A default that the recipe spells out is not told apart."""
    return getattr(section, name) != type(section).model_fields[name].default


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file with `a.b=value` overrides on top. Raises RecipeError in one line."""
    tree = read_tree(path, overrides)
    try:
        return recipe_from(tree)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def recipe_from(tree: dict[str, Any]) -> Recipe:
    """The recipe of a tree of plain values. Raises RecipeError in one line that begins with the setting."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(complaint(error, Recipe)) from None
