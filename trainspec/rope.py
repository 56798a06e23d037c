"""Rotary embedding: frequencies, their scalings, and the settings of a `config.json` that determine them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from trainspec.errors import ModelError

Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's scaling of the wavelengths (rope_type `llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (rope_type `linear`; position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """A base that grows beyond `max_positions` (rope_type `dynamic`, NTK-aware).

    Longer examples are refused, so that it changes nothing in training; it is kept for exported files.
    """

    factor: float


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (rope_type `yarn`, arXiv 2309.00071): slow pairs are stretched by `factor`, fast ones kept.

    `beta_fast` and `beta_slow` are the turns over `original_positions` at which a pair counts as fast and slow; with
    `truncate` the two pairs there are whole numbers. cos and sin are multiplied by `attention_factor`.
    """

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


RopeScaling = Llama3Scaling | LinearScaling | DynamicScaling | YarnScaling


class HasRope(Protocol):
    """The settings that determine the frequencies."""

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated, in pairs."""
        ...

    @property
    def rope_theta(self) -> float:
        """The base of the wavelengths."""
        ...

    @property
    def rotary_share(self) -> float:
        """`rotary_dim` as a share of the head."""
        ...

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """The scaling of the wavelengths."""
        ...


def inverse_frequencies(model: HasRope, dtype: DTypeLike) -> NDArray[Any]:
    """RoPE's angle per position for each rotated pair of a head: [rotary_dim / 2], computed in `dtype`.

    Source: RoFormer, arXiv 2104.09864; the scalings are Hugging Face's (`modeling_rope_utils.py`).
    """
    exponent = np.arange(0, model.rotary_dim, 2).astype(dtype) / np.asarray(model.rotary_dim, dtype)
    inverse = (1.0 / np.power(np.asarray(model.rope_theta, dtype), exponent)).astype(dtype)
    match model.rope_scaling:
        case Llama3Scaling() as scaling:
            return _llama3(inverse, scaling).astype(dtype)
        case LinearScaling(factor):
            return (inverse / factor).astype(dtype)
        case YarnScaling() as scaling:
            return _yarn(inverse, scaling, model).astype(dtype)
        case DynamicScaling() | None:
            return inverse


def table_factor(model: HasRope) -> float:
    """What cos and sin are multiplied by: 1 but for YaRN."""
    return model.rope_scaling.attention_factor if isinstance(model.rope_scaling, YarnScaling) else 1.0


def _llama3(inverse: NDArray[Any], scaling: Llama3Scaling) -> NDArray[Any]:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * np.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    stretched = inverse / scaling.factor
    smooth = (scaling.original_positions / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched + smooth * inverse
    is_long = wavelength > scaling.original_positions / low
    is_short = wavelength < scaling.original_positions / high
    return np.where(is_long, stretched, np.where(is_short, inverse, between))


def _yarn(inverse: NDArray[Any], scaling: YarnScaling, model: HasRope) -> NDArray[Any]:
    """From the pair that makes `beta_fast` turns to the one that makes `beta_slow`, the stretch grows linearly."""

    def pair(turns: float) -> float:
        waves = math.log(scaling.original_positions / (turns * 2 * math.pi))
        return model.rotary_dim * waves / (2 * math.log(model.rope_theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, model.rotary_dim - 1)
    width = last - first or 0.001  # transformers' way out where both are one pair
    stretch = np.clip((np.arange(len(inverse)).astype(inverse.dtype) - first) / width, 0, 1)
    return inverse / scaling.factor * stretch + inverse * (1 - stretch)


def rope_parameters(model: HasRope) -> dict[str, Any]:
    """The `rope_parameters` of a `config.json`, as `RopeFields.rope` reads them."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rotary_share != 1:
        rope["partial_rotary_factor"] = model.rotary_share
    match model.rope_scaling:
        case Llama3Scaling() as scaling:
            rope |= {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_positions,
            }
        case LinearScaling(factor):
            rope |= {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor):
            rope |= {"rope_type": "dynamic", "factor": factor}
        case YarnScaling() as scaling:
            rope |= {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_positions,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.truncate,
            }
        case None:
            pass
    return rope


class _Rope(BaseModel):
    """Rotary settings as written; `rope_type` was formerly called `type`. Null means absent."""

    model_config = ConfigDict(strict=True, extra="allow")
    rope_type: Literal["default", "linear", "dynamic", "llama3", "yarn"] | None = Field(
        None, validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: Positive | None = None
    partial_rotary_factor: float | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Size | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @model_validator(mode="before")
    @classmethod
    def _one_type(cls, value: Any) -> Any:
        # Given both, transformers takes `rope_type`, even a null one, which would then hide `type`.
        if isinstance(value, dict) and value.get("rope_type", "") is None and value.get("type") is not None:
            raise ValueError(f"rope_type null and type {value['type']!r}; leave one of them out")
        return value


# The settings that each rope_type needs, and those that it may have.
SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
# The types that have a context of their own before they were scaled.
_WITH_ORIGINAL = ("llama3", "yarn")
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


class Rotation(NamedTuple):
    """What a `config.json` says of the rotation: theta, the scaling, and the share of each head that is rotated."""

    theta: float
    scaling: RopeScaling | None
    share: float


class RopeFields(BaseModel):
    """The fields of a `config.json` that determine the rotation."""

    model_config = ConfigDict(strict=True, extra="ignore")
    default_theta: ClassVar[float] = 1e4
    # The share of a head that is rotated where the config says nothing; None: whole heads, whatever it says.
    default_share: ClassVar[float | None] = None
    max_position_embeddings: Size = 2048
    # transformers 5 writes `rope_parameters`; before, there were `rope_theta` and `rope_scaling`.
    rope_parameters: _Rope | None = None
    rope_theta: Positive | None = None
    rope_scaling: _Rope | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Size | None = None

    def rope(self, where: str) -> Rotation:
        """The rotation as transformers resolves it: `rope_scaling` first, completed by the fields of the config.

        Raises ModelError where `rope_scaling` and `rope_parameters` make two different models.
        """
        old, new = self.rope_scaling, self.rope_parameters
        old, new = (rope if rope and rope.model_fields_set else None for rope in (old, new))
        resolved = self._resolved(old or new or _Rope.model_validate({}), where)
        if old and new and self._resolved(new, where) != resolved:
            raise ModelError(
                f"{where}: rope_scaling says {_words(*resolved)}, rope_parameters {_words(*self._resolved(new, where))}; "
                "these are two models: keep the one that was trained"
            )
        return resolved

    def _resolved(self, rope: _Rope, where: str) -> Rotation:
        kind = rope.rope_type or "default"
        theta = rope.rope_theta or self.rope_theta or self.default_theta
        given = rope.model_dump()
        if kind in _WITH_ORIGINAL:
            given["original_max_position_embeddings"] = (
                self.original_max_position_embeddings
                or rope.original_max_position_embeddings
                or self.max_position_embeddings
            )
        for name in SETTINGS[kind]:
            if given[name] is None:
                raise ModelError(f"{where}: rope_type {kind} needs {name}")
        partial = rope.partial_rotary_factor or self.partial_rotary_factor or self.default_share or 1.0
        if self.default_share is not None:
            return Rotation(theta, self._scaling(kind, given, where), partial)
        if kind != "default" and partial != 1:
            raise ModelError(
                f"{where}: partial_rotary_factor {partial} with rope_type {kind} is unsupported; only whole heads are rotated"
            )
        return Rotation(theta, self._scaling(kind, given, where), 1.0)

    def _scaling(self, kind: str, given: dict[str, Any], where: str) -> RopeScaling | None:
        match kind:
            case "linear":
                return LinearScaling(given["factor"])
            case "dynamic":
                return DynamicScaling(given["factor"])
            case "llama3":
                values = [given[name] for name in SETTINGS[kind]]
                scaling = Llama3Scaling(*values)
                if scaling.high_freq_factor <= scaling.low_freq_factor:
                    raise ModelError(
                        f"{where}: high_freq_factor {scaling.high_freq_factor} must be more than low_freq_factor "
                        f"{scaling.low_freq_factor}"
                    )
                return scaling
            case "yarn":
                return _yarn_scaling(given)
            case _:
                return None


def _yarn_scaling(given: dict[str, Any]) -> YarnScaling:
    """Absent settings are those of the paper, as in transformers."""

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0

    weights = given["mscale"], given["mscale_all_dim"]
    derived = magnitude(weights[0]) / magnitude(weights[1]) if all(weights) else magnitude(1.0)
    return YarnScaling(
        factor=given["factor"],
        original_positions=given["original_max_position_embeddings"],
        beta_fast=given["beta_fast"] or 32.0,
        beta_slow=given["beta_slow"] or 1.0,
        attention_factor=given["attention_factor"] or derived,
        truncate=given["truncate"],
    )


_NAMES = {LinearScaling: "linear", DynamicScaling: "dynamic", Llama3Scaling: "llama3", YarnScaling: "yarn"}


def _words(theta: float, scaling: RopeScaling | None, share: float) -> str:
    part = "" if share == 1 else f", partial_rotary_factor {share:g}"
    if scaling is None:
        return f"rope_type default, theta {theta:g}{part}"
    numbers = ", ".join(f"{value:g}" for value in asdict(scaling).values())
    return f"rope_type {_NAMES[type(scaling)]} ({numbers}), theta {theta:g}{part}"


def rope_notes(config: dict[str, Any], fields: RopeFields, *, title: str, where: str) -> list[str]:
    """One sentence for each rotary setting that is not used or is overruled by another."""
    theta = fields.rope(where).theta
    notes = []
    if fields.rope_theta not in (None, theta):
        notes.append(
            f"rope_theta is {theta:g}, as its rope settings say; the {fields.rope_theta:g} beside them is not used"
        )
    setting = next((key for key in ("rope_scaling", "rope_parameters") if config.get(key)), "")
    rope = config.get(setting) or {}
    kind = rope.get("rope_type", rope.get("type")) or "default"
    unused = sorted(set(rope) - {*_COMMON, *SETTINGS[kind], *_OPTIONAL.get(kind, ())})
    if unused:
        notes.append(f"{setting} has {', '.join(map(repr, unused))}, which rope_type {kind} does not use")
    outer, inner = fields.original_max_position_embeddings, rope.get("original_max_position_embeddings")
    if kind in _WITH_ORIGINAL and outer and inner and outer != inner:
        notes.append(f"original_max_position_embeddings is {outer}; the {inner} in {setting} is not used")
    partial = rope.get("partial_rotary_factor") or fields.partial_rotary_factor or 1
    if fields.default_share is None and partial != 1:
        notes.append(f"partial_rotary_factor {partial:g} is not used: a {title} rotates whole heads")
    return notes
