"""ModelSpec: the sizes and rules of a Llama-family model, and the `config.json` that says them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trainspec.errors import ModelError, nearest

ARCHITECTURE, MODEL_TYPE = "LlamaForCausalLM", "llama"


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretch of the rotary wavelengths (Hugging Face's rope_type `llama3`)."""

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
    """A base that grows behind `max_positions` (rope_type `dynamic`, NTK-aware); up to there it is none.

    Rows behind `max_positions` are refused, so in training it changes nothing; it is kept for the files that are written.
    """

    factor: float


RopeScaling = Llama3Scaling | LinearScaling | DynamicScaling


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
    rope_scaling: RopeScaling | None
    max_positions: int
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    init_std: float


def inverse_frequencies(model: ModelSpec, dtype: DTypeLike) -> NDArray[Any]:
    """RoPE's angle per position for each pair of a head, shape [head_dim / 2], computed in `dtype`.

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
    """Long wavelengths are divided by `factor`, short ones kept, and those between interpolated."""
    wavelength = 2 * np.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    stretched = inverse / scaling.factor
    smooth = (scaling.original_positions / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched + smooth * inverse
    is_long = wavelength > scaling.original_positions / low
    is_short = wavelength < scaling.original_positions / high
    return np.where(is_long, stretched, np.where(is_short, inverse, between))


def config_of(model: ModelSpec) -> dict[str, Any]:
    """The `config.json` of a spec, without its stored type: what `model_spec_from_config` reads back."""
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
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
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
