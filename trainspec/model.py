"""ModelSpec: the sizes and rules of a Llama-family model, read from a Hugging Face `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trainspec.errors import ModelError, nearest

ARCHITECTURE = "LlamaForCausalLM"


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
            f"model.from: no directory {directory}; give a Hugging Face model directory or a preset"
        )
    if not path.is_file():
        raise ModelError(f"{path}: missing; a Hugging Face model directory holds a config.json")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    return model_spec_from_config(config, name=directory.name, where=str(path))


def model_spec_from_config(config: Mapping[str, Any], *, name: str, where: str) -> ModelSpec:
    """The ModelSpec of a parsed `config.json`; `where` names the source in errors."""
    architectures = config.get("architectures") or []
    if ARCHITECTURE not in architectures:
        raise ModelError(
            f"{where}: architecture {architectures or 'not given'} is unsupported; supported: {ARCHITECTURE}"
        )
    _refuse_unsupported(config, where)
    embed, heads = _need(config, "hidden_size", where), _need(config, "num_attention_heads", where)
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    theta, scaling = _rope(config, where)
    return ModelSpec(
        name=name,
        vocab=_need(config, "vocab_size", where),
        embed=embed,
        layers=_need(config, "num_hidden_layers", where),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.get("head_dim") or embed // heads,
        mlp=_need(config, "intermediate_size", where),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=config.get("max_position_embeddings", 2048),
        tied_embeddings=config.get("tie_word_embeddings", False),
        attention_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        init_std=config.get("initializer_range", 0.02),
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


def _need(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{where}: {key} must be a positive whole number, not {value!r}")
    return value


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    for key, only in (("hidden_act", "silu"), ("pretraining_tp", 1)):
        if config.get(key, only) != only:
            raise ModelError(f"{where}: {key}={config[key]!r} is unsupported; only {only!r} is")


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, Llama3Scaling | None]:
    # transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` stood side by side.
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)} | (
        config.get("rope_scaling") or {}
    )
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelError(f"{where}: rope_type {kind!r} is unsupported; supported: default, llama3")
    try:
        scaling = Llama3Scaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_positions=int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise ModelError(f"{where}: rope_type llama3 needs {error.args[0]}") from None
    return theta, scaling


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
