"""THE TABLE: one row per weight. Files, initial values, decay, LoRA targets, sharding and reports read it.

Canonical names and layouts are Hugging Face's: one entry per layer, linear weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainspec.model import ModelSpec
from trainspec.weight import Array

Role = Literal["embedding", "linear", "head", "norm", "adapter"]


@dataclass(frozen=True)
class Normal:
    """Independent normal values of mean 0 and standard deviation `std`."""

    std: float


@dataclass(frozen=True)
class UniformFanIn:
    """Independent uniform values in ±1/sqrt(fan_in): torch's start of a linear layer, PEFT's of LoRA's A."""

    fan_in: int


@dataclass(frozen=True)
class Zeros:
    """All zero."""


@dataclass(frozen=True)
class Ones:
    """All one."""


@dataclass(frozen=True)
class FromText:
    """What `text` leaves in the model; `trainspec.from_text` makes it from the model's own weights."""

    text: str


@dataclass(frozen=True)
class FromWeights:
    """What `make` gives of the starting values, in float64, of the weights that are called `names`."""

    names: tuple[str, ...]
    make: Callable[..., Array]


Init = Normal | UniformFanIn | Zeros | Ones | FromText | FromWeights


@dataclass(frozen=True)
class Param:
    """One weight: its canonical name, shape and logical axes (same order), and how it starts and decays."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    decay: bool
    role: Role
    layer: int | None = None

    @property
    def module(self) -> str:
        """The dotted name of the module that owns this weight."""
        return self.name.rsplit(".", 1)[0]

    @property
    def size(self) -> int:
        """How many elements it has."""
        total = 1
        for dim in self.shape:
            total *= dim
        return total


def param_table(model: ModelSpec) -> tuple[Param, ...]:
    """Every weight of a Llama-family model, in forward order. Norms and biases do not decay."""
    table = [
        _matrix(
            "model.embed_tokens", "embedding", model, (model.vocab, model.embed), ("vocab", "embed"), None
        )
    ]
    for i in range(model.layers):
        table += _layer(model, i)
    table.append(_norm("model.norm", model, None))
    if not model.tied_embeddings:
        table.append(_matrix("lm_head", "head", model, (model.vocab, model.embed), ("vocab", "embed"), None))
    return tuple(table)


def _layer(m: ModelSpec, i: int) -> list[Param]:
    base = f"model.layers.{i}"
    q_size, kv_size = m.heads * m.head_dim, m.kv_heads * m.head_dim
    linears = (
        ("self_attn.q_proj", (q_size, m.embed), ("heads", "embed"), m.attention_bias),
        ("self_attn.k_proj", (kv_size, m.embed), ("kv_heads", "embed"), m.attention_bias),
        ("self_attn.v_proj", (kv_size, m.embed), ("kv_heads", "embed"), m.attention_bias),
        ("self_attn.o_proj", (m.embed, q_size), ("embed", "heads"), m.attention_bias),
        ("mlp.gate_proj", (m.mlp, m.embed), ("mlp", "embed"), m.mlp_bias),
        ("mlp.up_proj", (m.mlp, m.embed), ("mlp", "embed"), m.mlp_bias),
        ("mlp.down_proj", (m.embed, m.mlp), ("embed", "mlp"), m.mlp_bias),
    )
    rows = [_norm(f"{base}.input_layernorm", m, i)]
    for name, shape, axes, bias in linears:
        if name == "mlp.gate_proj":
            rows.append(_norm(f"{base}.post_attention_layernorm", m, i))
        rows.append(_matrix(f"{base}.{name}", "linear", m, shape, axes, i))
        if bias:
            rows.append(Param(f"{base}.{name}.bias", shape[:1], axes[:1], Zeros(), False, "linear", i))
    return rows


def _matrix(
    module: str, role: Role, m: ModelSpec, shape: tuple[int, int], axes: tuple[str, str], layer: int | None
) -> Param:
    return Param(f"{module}.weight", shape, axes, Normal(m.init_std), True, role, layer)


def _norm(module: str, m: ModelSpec, layer: int | None) -> Param:
    return Param(f"{module}.weight", (m.embed,), ("embed",), Ones(), False, "norm", layer)
