"""ModelSpec: the sizes and rules of a Llama-family model, read from a Hugging Face `config.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from trainspec.errors import ModelError, nearest

ARCHITECTURE = "LlamaForCausalLM"
_Size = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretch of the rotary wavelengths (Hugging Face's rope_type `llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class ModelSpec:
    """One Llama-family model. `embed` is the hidden width, `mlp` the inner width of the SwiGLU block."""

    name: str
    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    max_positions: int
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    init_std: float


def inverse_frequencies(model: ModelSpec, dtype: DTypeLike) -> NDArray[Any]:
    """RoPE's angle per position for each pair of a head, shape [head_dim / 2], computed in `dtype`.

    Source: RoFormer, arXiv 2104.09864; the Llama 3 stretch follows Hugging Face's
    `_compute_llama3_parameters`: long wavelengths are divided by `factor`, short ones kept, and those
    between interpolated.
    """
    exponent = np.arange(0, model.head_dim, 2).astype(dtype) / np.asarray(model.head_dim, dtype)
    inverse = (1.0 / np.power(np.asarray(model.rope_theta, dtype), exponent)).astype(dtype)
    scaling = model.rope_scaling
    if scaling is None:
        return inverse
    wavelength = 2 * np.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    stretched = inverse / scaling.factor
    smooth = (scaling.original_positions / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched + smooth * inverse
    is_long = wavelength > scaling.original_positions / low
    is_short = wavelength < scaling.original_positions / high
    return np.where(is_long, stretched, np.where(is_short, inverse, between)).astype(dtype)


def read_model_spec(directory: Path) -> ModelSpec:
    """The ModelSpec of a Hugging Face model directory. Raises ModelError where it can't be trained here."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(
            f"model.from: no directory {directory}; give a Hugging Face model directory, hub:ORG/NAME or preset:NAME "
            f"(the demo's is made by `make model`)"
        )
    if not path.is_file():
        raise ModelError(f"{path}: missing; a Hugging Face model directory holds a config.json")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    return model_spec_from_config(config, name=directory.name, where=str(path))


class _Rope(BaseModel):
    """Rotary settings; `rope_type` was called `type` before."""

    model_config = ConfigDict(strict=True, extra="ignore")
    rope_type: Literal["default", "llama3"] = Field(
        "default", validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    factor: Annotated[float, Field(gt=0)] | None = None
    low_freq_factor: Annotated[float, Field(gt=0)] | None = None
    high_freq_factor: Annotated[float, Field(gt=0)] | None = None
    original_max_position_embeddings: _Size | None = None

    def scaling(self, where: str) -> Llama3Scaling | None:
        """Llama 3's stretch, where the type says so. Raises ModelError where a field of it is missing."""
        if self.rope_type == "default":
            return None
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factor, low, high, positions = (self.model_dump()[name] for name in names)
        for name in names:
            if self.model_dump()[name] is None:
                raise ModelError(f"{where}: rope_type llama3 needs {name}")
        if high <= low:
            raise ModelError(f"{where}: high_freq_factor {high} must be more than low_freq_factor {low}")
        return Llama3Scaling(factor, low, high, positions)


class _Config(BaseModel):
    """The fields of a Llama's `config.json` that decide its arithmetic, checked; the others are not read."""

    model_config = ConfigDict(strict=True, extra="ignore")
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    max_position_embeddings: _Size = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: Annotated[float, Field(ge=0)] = 0.02
    # What would change the arithmetic in a way that is not supported must have the one value that does not.
    hidden_act: Literal["silu"] = "silu"
    pretraining_tp: Literal[1] = 1
    attention_dropout: Annotated[float, Field(ge=0, le=0)] = 0.0
    # transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` stood side by side.
    rope_parameters: _Rope | None = None
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    rope_scaling: _Rope | None = None

    @property
    def rope(self) -> _Rope:
        """The rotary settings, wherever they stand."""
        return self.rope_parameters or self.rope_scaling or _Rope.model_validate({})


def model_spec_from_config(config: Any, *, name: str, where: str) -> ModelSpec:
    """The ModelSpec of a parsed `config.json`; `where` names the source in errors.

    Raises ModelError for another architecture, and for a field that is missing, malformed or unsupported.
    """
    architectures = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
        raise ModelError(
            f"{where}: architecture {architectures or 'not given'} is unsupported; supported: {ARCHITECTURE}"
        )
    try:
        fields = _Config.model_validate(config)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"] if isinstance(part, str))
        got = "" if detail["type"] == "missing" else f", not {detail['input']!r}"
        raise ModelError(f"{where}: {key}: {detail['msg'][0].lower()}{detail['msg'][1:]}{got}") from None
    heads, kv_heads = fields.num_attention_heads, fields.num_key_value_heads or fields.num_attention_heads
    head_dim = fields.head_dim or fields.hidden_size // heads
    if heads % kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise ModelError(f"{where}: head_dim {head_dim} is odd; rotary embedding turns pairs")
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
        rope_theta=fields.rope.rope_theta or fields.rope_theta or 1e4,
        rope_scaling=fields.rope.scaling(where),
        max_positions=fields.max_position_embeddings,
        tied_embeddings=fields.tie_word_embeddings,
        attention_bias=fields.attention_bias,
        mlp_bias=fields.mlp_bias,
        init_std=fields.initializer_range,
    )


def config_of(model: ModelSpec) -> dict[str, Any]:
    """The `config.json` of a spec, without its stored type: what `model_spec_from_config` reads back."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": model.rope_scaling.factor,
            "low_freq_factor": model.rope_scaling.low_freq_factor,
            "high_freq_factor": model.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": model.rope_scaling.original_positions,
        }
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": model.vocab,
        "hidden_size": model.embed,
        "intermediate_size": model.mlp,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": model.max_positions,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": model.attention_bias,
        "mlp_bias": model.mlp_bias,
        "initializer_range": model.init_std,
    }


def _preset(name: str, sizes: tuple[int, ...], *, theta: float = 1e4, positions: int = 4096) -> ModelSpec:
    vocab, embed, layers, heads, kv_heads, mlp = sizes
    return ModelSpec(
        name=name, vocab=vocab, embed=embed, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=embed // heads,
        mlp=mlp, norm_eps=1e-5, rope_theta=theta, rope_scaling=None, max_positions=positions, tied_embeddings=False,
        attention_bias=False, mlp_bias=False, init_std=0.02,
    )  # fmt: skip


# Sizes of published models: Llama 2 (arXiv 2307.09288), Llama 3 (arXiv 2407.21783).
PRESETS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _preset("tiny", (512, 64, 2, 4, 2, 128), positions=512),
        _preset("llama2-7b", (32000, 4096, 32, 32, 32, 11008)),
        _preset("llama2-13b", (32000, 5120, 40, 40, 40, 13824)),
        _preset("llama2-70b", (32000, 8192, 80, 64, 8, 28672)),
        _preset("llama3-8b", (128256, 4096, 32, 32, 8, 14336), theta=5e5, positions=8192),
        _preset("llama3-70b", (128256, 8192, 80, 64, 8, 28672), theta=5e5, positions=8192),
    )
}


def preset(name: str) -> ModelSpec:
    """The named preset. Raises ModelError with the nearest known name."""
    if name not in PRESETS:
        raise ModelError(f"model.from: no preset {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]
