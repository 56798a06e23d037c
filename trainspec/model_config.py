"""A ModelSpec from a Hugging Face `config.json`, as transformers 5 reads it for a Llama.

What transformers honours is honoured or refused by name; where two settings say two things, a note says which one counts.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainspec.errors import ModelError
from trainspec.model import (
    ARCHITECTURE,
    MODEL_TYPE,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    RopeScaling,
)

# Checkpoints converted before transformers 4.28 spell it in the second way.
ARCHITECTURES = (ARCHITECTURE, "LLaMAForCausalLM")
DEFAULT_THETA = 1e4
LONGEST = 120  # characters of a wrong value that are shown
_Size = Annotated[int, Field(ge=1)]
# Every layer has rows in the table of weights. The deepest Llama, 3.1 405B, has 126.
_Layers = Annotated[int, Field(ge=1, le=10_000)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# What transformers would honour and nothing here does, and the way out.
REFUSED = {
    "quantization_config": "quantized weights are not trained; give the model that they were made from",
    "per_layer_config": "layers of different sizes are not trained",
    "transformers_weights": "weights under another name are not read; rename the file to model.safetensors",
}
# Null in old files, and their default; transformers 5 does not take it.
SWITCHES = (
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "rope_theta",
    "original_max_position_embeddings",
)


def read_model_spec(directory: Path) -> ModelSpec:
    """The ModelSpec of a Hugging Face model directory. Raises ModelError where it can't be trained here."""
    return model_spec_from_config(
        read_config(directory), name=directory.name, where=str(directory / "config.json")
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model directory. Raises ModelError where there is none, or no JSON object."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(
            f"model.from: no directory {directory}; give a Hugging Face model directory, hub:ORG/NAME or preset:NAME "
            f"(the demo's is made by `make model`)"
        )
    if not path.is_file():
        if (directory / "adapter_config.json").is_file():
            raise ModelError(
                f"model.from: {directory} is an adapter; set method.adapter to it, and model.from to the model it belongs to"
            )
        raise ModelError(f"{path}: missing; a Hugging Face model directory holds a config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object, so no model is named; copy or download it again")
    return config


class _Rope(BaseModel):
    """Rotary settings as they are written; `rope_type` was called `type` before. Null is absent."""

    model_config = ConfigDict(strict=True, extra="allow")
    rope_type: Literal["default", "linear", "dynamic", "llama3"] | None = Field(
        None, validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: _Positive | None = None
    partial_rotary_factor: float | None = None
    factor: _Positive | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    original_max_position_embeddings: _Size | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_type(cls, value: Any) -> Any:
        # Of two that are given transformers takes `rope_type`; a null one hides `type` and is none itself.
        if isinstance(value, dict) and value.get("rope_type", "") is None and value.get("type") is not None:
            raise ValueError(f"rope_type null beside type {value['type']!r}; leave one of them out")
        return value


# Which settings a rope_type reads; the others are there for nothing.
ROPE_SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


class _Config(BaseModel):
    """The fields of a Llama's `config.json` that decide its arithmetic, checked; the others are not read."""

    model_config = ConfigDict(strict=True, extra="ignore")
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Layers
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    rms_norm_eps: _Positive = 1e-6
    max_position_embeddings: _Size = 2048
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    initializer_range: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    # What would change the arithmetic in a way that is not supported must have the one value that does not.
    hidden_act: Literal["silu", "swish"] = "silu"
    attention_dropout: Annotated[float, Field(ge=0, le=0)] | None = None
    is_causal: Literal[True] = True
    # transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` stood side by side.
    rope_parameters: _Rope | None = None
    rope_theta: _Positive | None = None
    rope_scaling: _Rope | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: _Size | None = None

    def rope(self, where: str) -> tuple[float, RopeScaling | None]:
        """Theta and scaling as transformers resolves them: `rope_scaling` first, settings beside it fill what it lacks.

        Raises ModelError where `rope_scaling` and `rope_parameters` make two different models.
        """
        old, new = self.rope_scaling, self.rope_parameters
        old, new = (rope if rope and rope.model_fields_set else None for rope in (old, new))
        found = self._resolved(old or new or _Rope.model_validate({}), where)
        if old and new and self._resolved(new, where) != found:
            raise ModelError(
                f"{where}: rope_scaling says {_words(*found)}, rope_parameters {_words(*self._resolved(new, where))}; "
                "these are two models: keep the one that was trained"
            )
        return found

    def _resolved(self, rope: _Rope, where: str) -> tuple[float, RopeScaling | None]:
        kind = rope.rope_type or "default"
        theta = rope.rope_theta or self.rope_theta or DEFAULT_THETA
        given = rope.model_dump()
        if kind == "llama3":
            given["original_max_position_embeddings"] = (
                self.original_max_position_embeddings
                or rope.original_max_position_embeddings
                or self.max_position_embeddings
            )
        for name in ROPE_SETTINGS[kind]:
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
                values = [given[name] for name in ROPE_SETTINGS[kind]]
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


def _said(value: object) -> str:
    words = "not given" if value is None else repr(value)
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}..."


def _parsed(config: dict[str, Any], where: str) -> _Config:
    """The checked fields. Raises ModelError for another architecture, and for what is malformed or unsupported."""
    given, kind = config.get("architectures"), config.get("model_type")
    named = given if isinstance(given, list) else [] if given is None else [given]
    is_llama = any(name in ARCHITECTURES for name in named) if named else kind == MODEL_TYPE
    if not is_llama or kind not in (MODEL_TYPE, None):
        raise ModelError(
            f"{where}: architectures {_said(given)} of model_type {_said(kind)} are unsupported; "
            f"supported: {ARCHITECTURE} (model_type {MODEL_TYPE})"
        )
    for key, reason in REFUSED.items():
        if config.get(key):
            raise ModelError(f"{where}: {key} is unsupported: {reason}")
    try:
        return _Config.model_validate(config)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"] if isinstance(part, str))
        value = "null" if detail["input"] is None else _said(detail["input"])
        got = "" if detail["type"] == "missing" else f", not {value}"
        raise ModelError(f"{where}: {key}: {detail['msg'][0].lower()}{detail['msg'][1:]}{got}") from None


def model_spec_from_config(config: dict[str, Any], *, name: str, where: str) -> ModelSpec:
    """The ModelSpec of a parsed `config.json`; `where` names the source in errors.

    Raises ModelError for another architecture, and for a field that is missing, malformed or unsupported.
    """
    fields = _parsed(config, where)
    heads, kv_heads = fields.num_attention_heads, fields.num_key_value_heads or fields.num_attention_heads
    head_dim = fields.head_dim or fields.hidden_size // heads
    if fields.hidden_size % heads:
        raise ModelError(
            f"{where}: hidden_size {fields.hidden_size} is no multiple of num_attention_heads {heads}"
        )
    if heads % kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise ModelError(f"{where}: head_dim {head_dim} is odd; rotary embedding turns pairs")
    theta, scaling = fields.rope(where)
    return ModelSpec(
        name=name,
        vocab=fields.vocab_size,
        embed=fields.hidden_size,
        layers=fields.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=fields.intermediate_size,
        norm_eps=fields.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=fields.max_position_embeddings,
        tied_embeddings=bool(fields.tie_word_embeddings),
        attention_bias=bool(fields.attention_bias),
        mlp_bias=bool(fields.mlp_bias),
        init_std=fields.initializer_range,
    )


def config_notes(config: dict[str, Any], *, where: str) -> list[str]:
    """A line for everything in a `config.json` that says something else than what is trained, as transformers has it."""
    fields = _parsed(config, where)
    theta, _ = fields.rope(where)
    notes = []
    if fields.rope_theta not in (None, theta):
        notes.append(
            f"rope_theta is {theta:g}, as its rope settings say; the {fields.rope_theta:g} beside them is not used"
        )
    place = next((key for key in ("rope_scaling", "rope_parameters") if config.get(key)), "")
    rope = config.get(place) or {}
    kind = rope.get("rope_type", rope.get("type")) or "default"
    unused = sorted(set(rope) - {*_ROPE_COMMON, *ROPE_SETTINGS[kind]})
    if unused:
        notes.append(f"{place} has {', '.join(map(repr, unused))}, which rope_type {kind} does not use")
    outer, inner = fields.original_max_position_embeddings, rope.get("original_max_position_embeddings")
    if kind == "llama3" and outer and inner and outer != inner:
        notes.append(f"original_max_position_embeddings is {outer}; the {inner} in {place} is not used")
    partial = rope.get("partial_rotary_factor") or fields.partial_rotary_factor or 1
    if partial != 1:
        notes.append(f"partial_rotary_factor {partial:g} is not used: a Llama rotates whole heads")
    if config.get("auto_map"):
        notes.append("auto_map names code of the model's own, which is not run: it is trained as a Llama")
    pad = config.get("pad_token_id")
    if _is_behind(pad, fields.vocab_size):
        notes.append(
            f"pad_token_id {pad} is behind the {fields.vocab_size} rows of the embedding, where transformers cannot load the "
            "model; it is not used, and an export leaves it out"
        )
    return [f"{where}: {note}" for note in notes]


def _is_behind(token: object, vocab: int) -> bool:
    return isinstance(token, int) and not -vocab <= token < vocab


def exported_config(config: dict[str, Any], model: ModelSpec) -> dict[str, Any]:
    """`config` for the weights of `model`: as it is, but for nulls and settings beside others that say something else."""
    kept = {key: value for key, value in config.items() if value is not None or key not in SWITCHES}
    for key in ("rope_parameters", "rope_scaling"):
        rope = kept.get(key)
        if isinstance(rope, dict):
            kept[key] = {name: value for name, value in rope.items() if value is not None}
    if "rope_theta" in kept:
        kept["rope_theta"] = model.rope_theta
    if bool(kept.get("tie_word_embeddings")) != model.tied_embeddings:
        kept["tie_word_embeddings"] = model.tied_embeddings
    if _is_behind(kept.get("pad_token_id"), model.vocab):
        del kept["pad_token_id"]
    return kept | {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}
