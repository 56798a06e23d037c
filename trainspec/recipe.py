"""The Recipe: one frozen tree that says what to train. Read from YAML with `--set a.b=c` on top, validated at once."""

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

from trainspec.complaint import LARGEST, complaint, format_value
from trainspec.date import DATE
from trainspec.errors import RecipeError
from trainspec.methods import LoRA, Method
from trainspec.plans.plan import Plan, Policy
from trainspec.recipe_file import read_tree
from trainspec.schedule import Schedule
from trainspec.tasks import TASKS, Language, TaskName

Positive = Annotated[int, Field(ge=1)]
# A file, a directory or `hub:ORG/NAME`.
Source = Annotated[str, Field(min_length=1)]
DEFAULT_STEPS = 200


class Section(BaseModel):
    """A section of the recipe: frozen, without unknown keys or silent type conversions.

    The docstring of a field is its description in the JSON schema.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        populate_by_name=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ModelSource(Section):
    """The model and its starting weights."""

    from_: Annotated[Source, Field(alias="from")]
    """A Hugging Face directory, `hub:ORG/NAME`, or `preset:NAME` (sizes only, with random weights)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """Whether training starts from the model's own weights or from random ones."""


def _as_pairs(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping such as {{instruction: question}}, not {format_value(value)}")
    for pair in value.items():
        for name in pair:
            if not isinstance(name, str):
                raise ValueError(
                    f"maps a field's name to a field's name; {format_value(name)} is not text: write it in quotes"
                )
    return tuple(sorted(value.items()))


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_date(value: Any) -> Any:
    # YAML reads an unquoted date as a date and a quoted one as text.
    try:
        return datetime.date.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"{format_value(value)} is not a date; write one such as 2024-07-26") from None


# Written as a mapping and stored as sorted pairs, so that a recipe is frozen and hashable.
Columns = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(_as_pairs),
    PlainSerializer(dict, return_type=dict[str, str]),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class Data(Section):
    """Records, how they become tokens, and how these fill examples.

    What is skipped, cut or split is counted and reported.
    """

    train: Source
    """The records to train on: a file, a directory that `datasets` saved, or `hub:ORG/NAME[:SPLIT]`."""
    heldout: Source | None = None
    """The records to measure the held-out loss on, given as for `train`; null: it is not measured."""
    task: TaskName = "question_answering"
    """The prompt that an instruction record is written with; `conversation` makes it a question and an answer of the chat
    template, `text` trains on plain text."""
    prompts: Source | None = None
    """A YAML or JSON file whose prompts replace those of the tasks; null: the tasks' own."""
    language: Language = "en"
    """The language of the task's prompt, and that of the answers when they are measured."""
    columns: Columns = ()
    """Which field of the file stands for which of ours: `{instruction: question}`."""
    ignore: Names = ()
    """Fields of a record or of a message that are not used."""
    bad_records: Literal["stop", "skip"] = "stop"
    """Whether malformed records stop the run or are skipped."""
    tokenizer: Source | None = None
    """The directory of the tokenizer; null: the model's."""
    chat_template: Source | None = None
    """A jinja file to use as the chat template; null: the tokenizer's own."""
    system: str | None = None
    """The system message of conversations that have none."""
    date: Annotated[datetime.date, BeforeValidator(_as_date)] = DATE
    """The date that a chat template is given as today's, so that a run does not depend on the day."""
    sequence_tokens: Positive = 256
    """Tokens per example."""
    packing: bool = False
    """Whether an example holds several records or one record and padding."""
    padding_side: Literal["right", "left"] = "right"
    """Where an example that is not full is padded."""
    loss_on: Literal["completion", "all"] = "completion"
    """The target tokens: the response with its end token, or the prompt as well."""
    too_long: Literal["skip", "cut", "split"] = "skip"
    """What happens to a record longer than an example: it is skipped, cut, or split over several examples."""
    cache: Source = "build/cache"
    """The directory in which tokens are cached."""


class Batch(Section):
    """How many examples one update sees, and in how many passes."""

    global_examples: Positive = 16
    """Examples per update, over all devices."""
    accumulation: Positive = 1
    """Into how many forward and backward passes, one after the other, the examples of an update are split."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.global_examples % self.accumulation:
            raise ValueError(
                f"batch.accumulation={self.accumulation} does not divide batch.global_examples={self.global_examples}"
            )
        return self


class Precision(Section):
    """Number formats (docs/numerics.md)."""

    policy: Policy = "fp32"
    """What weights are stored in and computed with; bf16 trains float32 master weights."""
    reduce: Policy = "fp32"
    """The type in which gradients are summed over devices; by default fp64 in fp64 runs, else fp32."""

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
    """AdamW with decoupled weight decay (arXiv 1711.05101), and clipping by the global gradient norm."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    """The peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """The decay rates of the first and the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """The weight decay per update, as a factor of the learning rate; norms and biases do not decay."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """The largest gradient norm, to which longer gradients are scaled; null: no clipping."""

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
                f"{format_value(value)} is not a norm to clip to; for no clipping write optimizer.clip_norm=null"
            )
        return value


class Checkpoint(Section):
    """When the training state is saved, how, and what is kept. The last update always is."""

    every_steps: Positive = 50
    """Updates from one checkpoint to the next."""
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after which one is saved besides, counted from the last; null: updates alone decide."""
    keep: Positive = 2
    """How many of the newest checkpoints are kept."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """How many of those with the lowest held-out loss are kept besides."""
    keep_every_steps: Positive | None = None
    """Checkpoints of updates that this divides are kept for good; null: none is."""
    format: Literal["portable", "native"] = "portable"
    """Portable checkpoints are read by every backend and plan, native ones by the backend that wrote them."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What a run does when a checkpoint cannot be written, as on a full disk: it stops, or reports it and goes on."""


@dataclass(frozen=True)
class RunLength:
    """How long a run is: its schedule spans `steps` updates, and it ends after update `last`."""

    steps: int
    last: int
    epochs: float | None

    def describe(self, *, examples: int | None, global_examples: int) -> str:
        """The length in updates, and in epochs where the number of `examples` is known; `global_examples` per update."""
        stop = "" if self.last == self.steps else f", of which this run makes {self.last}"
        if self.epochs is not None:
            return f"{_epochs(self.epochs)} of {examples} examples: {self.steps} updates{stop}"
        if examples is None:
            return f"{self.steps} updates{stop}"
        epochs = _epochs(self.steps * global_examples / examples)
        return f"{self.steps} updates: {epochs} of {examples} examples{stop}"


def _epochs(number: float) -> str:
    return f"{number:.4g} epoch{'' if number == 1 else 's'}"


class Run(Section):
    """How long to train, from which seed, and how often to measure the held-out loss.

    Give either `steps` or `epochs`.
    """

    steps: Positive | None = None
    """Updates that the schedule spans; 200 where `epochs` is not given either."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the examples that the schedule spans, not necessarily a whole number; null: `steps` says it."""
    stop_after_steps: Positive | None = None
    """Ends the run after this update, without a change of the schedule."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides random weights, the order of the examples and dropout."""
    eval_every_steps: Positive = 50
    """Updates from one measurement of the held-out loss to the next; the last update always has one."""
    eval_generations: Annotated[int, Field(ge=0)] = 0
    """How many held-out prompts are answered at each measurement, shown in TensorBoard and written to samples.jsonl."""

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
                f"run.steps={self.steps} and run.epochs={self.epochs:g}: give one of them, and null for the other: --set run.epochs=null"
            )
        return self


class Recipe(Section):
    """Everything that defines a training run; equal recipes give equal runs on every backend."""

    model: ModelSource
    """Which model is trained."""
    method: Method = LoRA()
    """Which weights are trained: those of the model, or what is added to it."""
    data: Data
    """Records, how they become tokens, and how they fill the examples."""
    batch: Batch = Batch()
    """The examples of one update."""
    plan: Plan = Plan()
    """How the run is spread over devices."""
    precision: Precision = Precision()
    """Number formats."""
    optimizer: AdamW = AdamW()
    """AdamW and gradient clipping."""
    schedule: Schedule = Schedule()
    """The learning rate over the run."""
    checkpoint: Checkpoint = Checkpoint()
    """When the training state is saved, how, and what is kept."""
    run: Run = Run()
    """How long to train, and from which seed."""

    @model_validator(mode="before")
    @classmethod
    def _default_kind(cls, value: Any) -> Any:
        method = value.get("method") if isinstance(value, dict) else None
        if isinstance(method, dict) and "kind" not in method:
            return value | {"method": {"kind": LoRA().kind} | method}
        return value

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.checkpoint.keep_best and self.data.heldout is None:
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best}: without data.heldout no held-out loss is measured; set "
                "data.heldout, or checkpoint.keep_best=0"
            )
        return self

    @model_validator(mode="after")
    def _answered_are_there(self) -> Self:
        if self.run.eval_generations and self.data.heldout is None:
            raise ValueError(
                f"run.eval_generations={self.run.eval_generations}: without data.heldout there are no held-out prompts; set "
                "data.heldout, or run.eval_generations=0"
            )
        if self.run.eval_generations and self.data.task == "text":
            raise ValueError(
                f"run.eval_generations={self.run.eval_generations}: plain text (data.task=text) has no prompts; set "
                "run.eval_generations=0"
            )
        return self

    def span(self, count_examples: Callable[[], int]) -> RunLength:
        """How long the run is. `count_examples` is called only where the length is given in epochs.

        Raises RecipeError for a number of updates that no file could hold.
        """
        run, steps = self.run, self.run.steps
        if steps is None:
            # As the user wrote it: 1.1 epochs of 100 examples are 110, and in floating point a little more.
            seen = Fraction(str(run.epochs)) * count_examples()
            steps = math.ceil(seen / self.batch.global_examples)
            if steps > LARGEST:
                raise RecipeError(
                    f"run.epochs={run.epochs:g}: more updates than can be counted; give less, or run.steps"
                )
        return RunLength(steps, min(steps, run.stop_after_steps or steps), run.epochs)

    def with_steps(self, span: RunLength) -> Recipe:
        """The recipe with its length given in updates, not in epochs."""
        return self.model_copy(
            update={"run": self.run.model_copy(update={"steps": span.steps, "epochs": None})}
        )

    def to_yaml(self) -> str:
        """The recipe with every default written out; `load_recipe` reads an equal one back."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False)


def idle_settings(recipe: Recipe, span: RunLength) -> list[str]:
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
    every, measured = recipe.checkpoint.every_steps, recipe.run.eval_every_steps
    if recipe.checkpoint.keep_best and every % measured:
        lines.append(
            f"checkpoint.keep_best={recipe.checkpoint.keep_best}: of the checkpoints, one every {every} updates, only those "
            f"after a measurement, every {measured} updates, can be the best: one every {math.lcm(every, measured)}, and the last"
        )
    if recipe.data.prompts is not None and recipe.data.task not in TASKS:
        lines.append(
            f"no effect: data.prompts={recipe.data.prompts}: data.task={recipe.data.task} has no prompt"
        )
    warmup = schedule.warmup(span.steps)
    if warmup >= span.steps:
        lines.append(
            f"the rate never reaches its peak: the warm-up takes {warmup} of the schedule's {span.steps} updates"
        )
    return lines


def _is_set(section: BaseModel, name: str) -> bool:
    """Whether a setting differs from its default, spelled out or not."""
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
