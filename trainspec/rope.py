"""Rotary embedding: frequencies, their scalings, and the settings of a `config.json` that determine them.

Shared by every family that rotates whole heads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

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


RopeScaling = Llama3Scaling | LinearScaling | DynamicScaling


class HasRope(Protocol):
    """The settings that determine the frequencies."""

    @property
    def head_dim(self) -> int:
        """Elements of a head, which are rotated in pairs."""
        ...

    @property
    def rope_theta(self) -> float:
        """The base of the wavelengths."""
        ...

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """The scaling of the wavelengths."""
        ...


def inverse_frequencies(model: HasRope, dtype: DTypeLike) -> NDArray[Any]:
    """RoPE's angle per position for each pair of a head: [head_dim / 2], computed in `dtype`.

    Source: RoFormer, arXiv 2104.09864; the scalings are Hugging Face's (`modeling_rope_utils.py`).
    """
    exponent = np.arange(0, model.head_dim, 2).astype(dtype) / np.asarray(model.head_dim, dtype)
    inverse = (1.0 / np.power(np.asarray(model.rope_theta, dtype), exponent)).astype(dtype)
    match model.rope_scaling:
        case Llama3Scaling() as scaling:
            return _llama3(inverse, scaling).astype(dtype)
        case LinearScaling(factor):
            return (inverse / factor).astype(dtype)
        case DynamicScaling() | None:
            return inverse


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


def rope_parameters(model: HasRope) -> dict[str, Any]:
    """The `rope_parameters` of a `config.json`, as `RopeFields.rope` reads them."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
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
        case None:
            pass
    return rope


class _Rope(BaseModel):
    """Rotary settings as written; `rope_type` was formerly called `type`. Null means absent."""

    model_config = ConfigDict(strict=True, extra="allow")
    rope_type: Literal["default", "linear", "dynamic", "llama3"] | None = Field(
        None, validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: Positive | None = None
    partial_rotary_factor: float | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Size | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_type(cls, value: Any) -> Any:
        # Given both, transformers takes `rope_type`, even a null one, which would then hide `type`.
        if isinstance(value, dict) and value.get("rope_type", "") is None and value.get("type") is not None:
            raise ValueError(f"rope_type null and type {value['type']!r}; leave one of them out")
        return value


# The settings that each rope_type uses.
SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


class RopeFields(BaseModel):
    """The fields of a `config.json` that determine the rotation."""

    model_config = ConfigDict(strict=True, extra="ignore")
    default_theta: ClassVar[float] = 1e4
    max_position_embeddings: Size = 2048
    # transformers 5 writes `rope_parameters`; before, there were `rope_theta` and `rope_scaling`.
    rope_parameters: _Rope | None = None
    rope_theta: Positive | None = None
    rope_scaling: _Rope | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Size | None = None

    def rope(self, where: str) -> tuple[float, RopeScaling | None]:
        """Theta and scaling as transformers resolves them: `rope_scaling` first, completed by the fields of the config.

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

    def _resolved(self, rope: _Rope, where: str) -> tuple[float, RopeScaling | None]:
        kind = rope.rope_type or "default"
        theta = rope.rope_theta or self.rope_theta or self.default_theta
        given = rope.model_dump()
        if kind == "llama3":
            given["original_max_position_embeddings"] = (
                self.original_max_position_embeddings
                or rope.original_max_position_embeddings
                or self.max_position_embeddings
            )
        for name in SETTINGS[kind]:
            if given[name] is None:
                raise ModelError(f"{where}: rope_type {kind} needs {name}")
        partial = rope.partial_rotary_factor or self.partial_rotary_factor or 1.0
        if kind != "default" and partial != 1:
            raise ModelError(
                f"{where}: partial_rotary_factor {partial} with rope_type {kind} is unsupported; only whole heads are rotated"
            )
        match kind:
            case "default":
                return theta, None
            case "linear":
                return theta, LinearScaling(given["factor"])
            case "dynamic":
                return theta, DynamicScaling(given["factor"])
            case "llama3":
                values = [given[name] for name in SETTINGS[kind]]
                scaling = Llama3Scaling(*values)
                if scaling.high_freq_factor <= scaling.low_freq_factor:
                    raise ModelError(
                        f"{where}: high_freq_factor {scaling.high_freq_factor} must be more than low_freq_factor "
                        f"{scaling.low_freq_factor}"
                    )
                return theta, scaling


def _words(theta: float, scaling: RopeScaling | None) -> str:
    if scaling is None:
        return f"rope_type default, theta {theta:g}"
    kind = {LinearScaling: "linear", DynamicScaling: "dynamic", Llama3Scaling: "llama3"}[type(scaling)]
    numbers = ", ".join(f"{value:g}" for value in asdict(scaling).values())
    return f"rope_type {kind} ({numbers}), theta {theta:g}"


def rope_notes(config: dict[str, Any], fields: RopeFields, *, title: str, where: str) -> list[str]:
    """One sentence for each rotary setting that is not used or is overruled by another."""
    theta, _ = fields.rope(where)
    notes = []
    if fields.rope_theta not in (None, theta):
        notes.append(
            f"rope_theta is {theta:g}, as its rope settings say; the {fields.rope_theta:g} beside them is not used"
        )
    setting = next((key for key in ("rope_scaling", "rope_parameters") if config.get(key)), "")
    rope = config.get(setting) or {}
    kind = rope.get("rope_type", rope.get("type")) or "default"
    unused = sorted(set(rope) - {*_COMMON, *SETTINGS[kind]})
    if unused:
        notes.append(f"{setting} has {', '.join(map(repr, unused))}, which rope_type {kind} does not use")
    outer, inner = fields.original_max_position_embeddings, rope.get("original_max_position_embeddings")
    if kind == "llama3" and outer and inner and outer != inner:
        notes.append(f"original_max_position_embeddings is {outer}; the {inner} in {setting} is not used")
    partial = rope.get("partial_rotary_factor") or fields.partial_rotary_factor or 1
    if partial != 1:
        notes.append(f"partial_rotary_factor {partial:g} is not used: a {title} rotates whole heads")
    return notes
