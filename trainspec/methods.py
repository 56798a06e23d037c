"""Training methods: what is trained, which modules it touches, and the rows it adds to the table.

Sources: LoRA, arXiv 2106.09685, and rank-stabilised, 2312.03732; bottleneck adapters, 1902.00751; prompt tuning,
2104.08691; P-tuning, 2103.10385; prefix tuning, 2101.00190, and P-tuning v2, 2110.07602. Names, layouts and initial
values are those of PEFT's modules, where PEFT has the method.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Literal, Self, assert_never, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trainspec.errors import RecipeError
from trainspec.model import ModelSpec
from trainspec.params import FromText, Init, Normal, Param, UniformFanIn, Zeros, param_table

PEFT_PREFIX = "base_model.model."
# The module that makes virtual tokens, in canonical names.
ENCODER = "prompt_encoder"
# The layers of P-tuning's LSTM: PEFT's default.
LSTM_LAYERS = 2

_Count = Annotated[int, Field(ge=1)]
_Rate = Annotated[float, Field(ge=0, lt=1)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Full(_Spec):
    """Every weight of the model is trained."""

    kind: Literal["full"] = "full"


class LoRA(_Spec):
    """y = W x + scale B A dropout(x); only A and B are trained.

    `targets` is a list of module names (`q_proj`, or any longer tail of the dotted name), one regular
    expression that must match the whole dotted name, or `all-linear` (every linear layer but the head).
    `adapter` is a PEFT directory to start from; without it A is uniform in ±1/sqrt(in) and B is zero.
    """

    kind: Literal["lora"] = "lora"
    rank: _Count = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: _Rate = 0.0
    rslora: bool = False
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    adapter: str | None = None

    @field_validator("targets", mode="before")
    @classmethod
    def _freeze(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @property
    def scale(self) -> float:
        """The factor of the low-rank product: alpha / rank, with `rslora` alpha / sqrt(rank)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class Adapter(_Spec):
    """h + up(act(down(h))) on what attention and what the MLP add to the residual stream, in every layer.

    `bottleneck` is the width between `down` and `up`; gelu is the exact one. `up` and the biases start at zero, so
    that the model starts unchanged. `adapter` is a directory of docs/adapter-files.md to start from.
    """

    kind: Literal["adapter"] = "adapter"
    bottleneck: _Count = 64
    activation: Literal["relu", "gelu", "silu"] = "relu"
    adapter: str | None = None


class PromptTuning(_Spec):
    """`virtual_tokens` trained rows in front of the embedded tokens.

    They start from N(0, 1), from zero, or (`init: text`) as the embeddings of `text`, repeated or cut to length.
    `adapter` is a PEFT directory to start from: of prompt tuning, or what a P-tuning encoder gave.
    """

    kind: Literal["prompt"] = "prompt"
    virtual_tokens: _Count = 20
    init: Literal["random", "zero", "text"] = "random"
    text: str | None = None
    adapter: str | None = None

    @model_validator(mode="after")
    def _startable(self) -> Self:
        _check_start(self.init, self.text, self.adapter)
        return self


class PTuning(_Spec):
    """Prompt tuning whose rows an encoder makes from trained embeddings.

    `mlp` is Linear-ReLU-Linear-ReLU-Linear, `lstm` two bidirectional layers with `dropout` between them and
    Linear-ReLU-Linear behind; `hidden` is the encoder's width, by default the model's. `adapter` is a directory that
    holds the encoder as well (docs/adapter-files.md).
    """

    kind: Literal["ptuning"] = "ptuning"
    virtual_tokens: _Count = 20
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: _Count | None = None
    dropout: _Rate = 0.0
    adapter: str | None = None

    @model_validator(mode="after")
    def _has_dropout(self) -> Self:
        if self.dropout and self.encoder != "lstm":
            raise ValueError(
                f"method.dropout={self.dropout}: only P-tuning's LSTM has dropout; leave it out or set "
                "method.encoder=lstm"
            )
        return self


class PrefixTuning(_Spec):
    """`virtual_tokens` trained keys and values in front of every layer's own, visible to all tokens.

    With `projection`, Linear-Tanh-Linear of width `hidden` (by default that of a layer's keys) makes them from one
    embedding per virtual token. They start from N(0, 1), from zero, or (`init: text`, without projection) as the keys
    and values that `text`, repeated or cut to length, leaves in the model. `adapter` is a PEFT directory to start from.
    """

    kind: Literal["prefix"] = "prefix"
    virtual_tokens: _Count = 20
    projection: bool = False
    hidden: _Count | None = None
    init: Literal["random", "zero", "text"] = "random"
    text: str | None = None
    adapter: str | None = None

    @model_validator(mode="after")
    def _startable(self) -> Self:
        _check_start(self.init, self.text, self.adapter)
        if self.init == "text" and self.projection:
            raise ValueError(
                "method.init=text: no projection gives wanted keys and values; set method.projection=false"
            )
        if self.hidden is not None and not self.projection:
            raise ValueError(
                f"method.hidden={self.hidden}: the width of a projection; set method.projection=true or leave it out"
            )
        return self


def _check_start(init: str, text: str | None, adapter: str | None) -> None:
    if (init == "text") != (text is not None):
        missing = "method.init=text: method.text is missing" if init == "text" else "method.text: not used"
        raise ValueError(f"{missing}; give method.init=text and method.text together")
    if adapter is not None and init != "random":
        reset = "method.init=random" + (" and method.text=null" if text is not None else "")
        raise ValueError(
            f"method.init={init}: method.adapter says how to start; leave it out, or set {reset}"
        )


Virtual = PromptTuning | PTuning | PrefixTuning
Method = Annotated[Full | LoRA | Adapter | PromptTuning | PTuning | PrefixTuning, Field(discriminator="kind")]
METHODS: dict[str, type[_Spec]] = {
    spec.model_fields["kind"].default: spec for spec in get_args(get_args(Method)[0])
}


def virtual_tokens(method: Method) -> int:
    """How many virtual tokens there are: by as much the positions of the real ones are moved."""
    return method.virtual_tokens if isinstance(method, Virtual) else 0


def leading_rows(method: Method) -> int:
    """How many rows stand in front of the embedded tokens of an example."""
    return method.virtual_tokens if isinstance(method, PromptTuning | PTuning) else 0


def trainable_table(model: ModelSpec, method: Method) -> tuple[Param, ...]:
    """The rows that `method` trains; everything else in the model is frozen."""
    return param_table(model) if isinstance(method, Full) else adapter_table(model, method)


def full_table(model: ModelSpec, method: Method) -> tuple[Param, ...]:
    """Every row of the run: the model's own and, behind them, the method's."""
    return param_table(model) + adapter_table(model, method)


def adapter_table(model: ModelSpec, method: Method) -> tuple[Param, ...]:
    """One row per weight that `method` adds to the model, in forward order."""
    match method:
        case Full():
            return ()
        case LoRA():
            return _lora_rows(model, method)
        case Adapter():
            return _bottleneck_rows(model, method)
        case PromptTuning():
            shape = (method.virtual_tokens, model.embed)
            return (_embedding(shape, ("virtual", "embed"), _start(method)),)
        case PTuning():
            return _ptuning_rows(model, method)
        case PrefixTuning():
            return _prefix_rows(model, method)
        case other:
            assert_never(other)


def _lora_rows(model: ModelSpec, method: LoRA) -> tuple[Param, ...]:
    """A is (rank, in) and B is (out, rank), named as in PEFT's files; each takes its base's axis, `rank` is whole."""
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


def _bottleneck_rows(model: ModelSpec, method: Adapter) -> tuple[Param, ...]:
    embed, width = ("embed", model.embed), ("bottleneck", method.bottleneck)
    table: list[Param] = []
    for i in range(model.layers):
        for place in ("attention_adapter", "mlp_adapter"):
            base = f"model.layers.{i}.{place}"
            table += _linear(f"{base}.down", width, embed, (UniformFanIn(model.embed), Zeros()), layer=i)
            table += _linear(f"{base}.up", embed, width, (Zeros(), Zeros()), layer=i)
    return tuple(table)


def _ptuning_rows(model: ModelSpec, method: PTuning) -> tuple[Param, ...]:
    embed, width = ("embed", model.embed), ("hidden", method.hidden or model.embed)
    rows = [_embedding((method.virtual_tokens, model.embed), ("virtual", "embed"), Normal(1.0))]
    if method.encoder == "mlp":
        sizes = (embed, width, width, embed)
        for i, (inner, outer) in enumerate(pairwise(sizes)):
            rows += _linear(f"{ENCODER}.mlp_head.{2 * i}", outer, inner)
        return tuple(rows)
    both = ("hidden", 2 * width[1])
    for layer in range(LSTM_LAYERS):
        axis, size = embed if layer == 0 else both
        for way in ("", "_reverse"):
            for leaf, shape, axes in (
                ("weight_ih", (4 * width[1], size), ("hidden", axis)),
                ("weight_hh", (4 * width[1], width[1]), ("hidden", "hidden")),
                ("bias_ih", (4 * width[1],), ("hidden",)),
                ("bias_hh", (4 * width[1],), ("hidden",)),
            ):
                name = f"{ENCODER}.lstm_head.{leaf}_l{layer}{way}"
                rows.append(_encoder_row(name, shape, axes, UniformFanIn(width[1])))
    rows += _linear(f"{ENCODER}.mlp_head.0", both, both)
    rows += _linear(f"{ENCODER}.mlp_head.2", embed, both)
    return tuple(rows)


def _prefix_rows(model: ModelSpec, method: PrefixTuning) -> tuple[Param, ...]:
    width = model.kv_heads * model.head_dim
    whole = ("prefix", 2 * model.layers * width)
    if not method.projection:
        return (_embedding((method.virtual_tokens, whole[1]), ("virtual", "prefix"), _start(method)),)
    hidden = ("prefix_hidden", method.hidden or width)
    last = UniformFanIn(hidden[1]) if method.init == "random" else Zeros()
    return (
        _embedding((method.virtual_tokens, width), ("virtual", "prefix"), Normal(1.0)),
        *_linear(f"{ENCODER}.transform.0", hidden, ("prefix", width)),
        *_linear(f"{ENCODER}.transform.2", whole, hidden, (last, last)),
    )


def _start(method: PromptTuning | PrefixTuning) -> Init:
    match method.init:
        case "random":
            return Normal(1.0)
        case "zero":
            return Zeros()
        case "text":
            assert method.text is not None  # the recipe is refused without it
            return FromText(method.text)


def _embedding(shape: tuple[int, int], axes: tuple[str, str], init: Init) -> Param:
    return _encoder_row(f"{ENCODER}.embedding.weight", shape, axes, init)


def _encoder_row(name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Init) -> Param:
    is_bias = len(shape) == 1
    return Param(name, shape, axes, init, decay=not is_bias, role="adapter")


def _linear(
    module: str,
    out: tuple[str, int],
    inner: tuple[str, int],
    init: tuple[Init, Init] | None = None,
    *,
    layer: int | None = None,
) -> list[Param]:
    """Weight (out, in) and bias; both uniform in ±1/sqrt(in), torch's default, where nothing else is said."""
    weight, bias = init or (UniformFanIn(inner[1]), UniformFanIn(inner[1]))
    return [
        Param(f"{module}.weight", (out[1], inner[1]), (out[0], inner[0]), weight, True, "adapter", layer),
        Param(f"{module}.bias", (out[1],), (out[0],), bias, False, "adapter", layer),
    ]


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
