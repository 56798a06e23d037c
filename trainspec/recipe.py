"""The Recipe: one frozen tree that says what to train. YAML in, `--set a.b=c` on top, checked at birth."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
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
    model_validator,
)

from trainspec.errors import RecipeError, nearest
from trainspec.methods import METHODS, LoRA, Method
from trainspec.plan import Plan, Policy
from trainspec.records import Task
from trainspec.schedule import Schedule

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the recipe: frozen, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class ModelSource(Section):
    """Where the model comes from: a Hugging Face directory, a hub id, or `preset:NAME` (random weights only)."""

    from_: Annotated[str, Field(alias="from")]
    weights: Literal["pretrained", "random"] = "pretrained"


def _as_pairs(value: Any) -> Any:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_date(value: Any) -> Any:
    # YAML makes a date of an unquoted one; a quoted one is text.
    return datetime.date.fromisoformat(value) if isinstance(value, str) else value


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

    train: str
    heldout: str | None = None
    task: Task = "question_answering"
    columns: Columns = ()
    ignore: Names = ()
    bad_records: Literal["stop", "skip"] = "stop"
    tokenizer: str | None = None
    chat_template: str | None = None
    system: str | None = None
    date: Annotated[datetime.date, BeforeValidator(_as_date)] = datetime.date(2024, 7, 26)
    sequence_tokens: Positive = 256
    packing: bool = False
    padding_side: Literal["right", "left"] = "right"
    loss_on: Literal["completion", "all"] = "completion"
    too_long: Literal["skip", "cut", "split"] = "skip"
    cache: str = "build/cache"


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


class Checkpoint(Section):
    """How often the training state is saved, and how many of the newest are kept."""

    every_steps: Positive = 50
    keep: Positive = 2


class Run(Section):
    """How long to train, from which seed, and how often to measure the held-out loss.

    The schedule spans `steps`; `stop_after_steps` ends a run earlier without changing it.
    """

    steps: Positive = 200
    stop_after_steps: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    eval_every_steps: Positive = 50

    @property
    def last_step(self) -> int:
        """The number of updates that this run makes."""
        return min(self.steps, self.stop_after_steps or self.steps)


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

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; `load_recipe` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file with `a.b=value` overrides on top. Raises RecipeError in one line."""
    try:
        tree = yaml.load(path.read_text(), Loader=_Loader)
    except OSError as error:
        raise RecipeError(
            f"{path}: {error.strerror}; give the path of a recipe, such as configs/demo.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections such as model, method and data")
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_first_line(error)}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-4` as a string and takes a key twice; a recipe means a number, and a key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; a key that stands there twice is an error."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key!r} is given twice, line {node.start_mark.line + 1} and on")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r}: write KEY=VALUE, such as --set run.steps=10")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {override}: {parent!r} is a value, not a section")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: {text!r} is not a YAML value") from None
    if key == "method.kind" and node.get("kind", value) != value:
        node.clear()  # another method has other fields: those of the old one don't carry over
    node[leaf] = value


def _first_line(error: ValidationError) -> str:
    """The first complaint as `section.key: what is wrong; what is right`."""
    detail = error.errors()[0]
    place = [str(p) for p in detail["loc"]]
    if place[0] == "method" and len(place) > 1 and place[1] in METHODS:
        del place[1]  # the kind that pydantic has chosen
    where = ".".join(place)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(place[-1], _fields(place[:-1], detail['loc']))}"
    if detail["type"] == "missing":
        return f"{where}: missing; the recipe must say it"
    if detail["type"].startswith("union_tag"):
        kind = detail["input"].get("kind") if isinstance(detail["input"], dict) else detail["input"]
        return f"{where}.kind: {'missing' if kind is None else f'unknown kind {kind!r}'}; choose one of {', '.join(METHODS)}"
    if detail["type"] == "value_error":
        return message
    return f"{where}: {message[0].lower()}{message[1:]}, not {detail['input']!r}"


def _fields(place: Sequence[str], loc: tuple[int | str, ...]) -> list[str]:
    """The known keys of the section at `place`."""
    if place == ["method"]:
        section: type[BaseModel] = METHODS[str(loc[1])]
    else:
        section = Recipe
        for part in place:
            section = section.model_fields[part].annotation  # type: ignore[assignment]
    return [field.alias or name for name, field in section.model_fields.items()]
