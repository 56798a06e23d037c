"""ModelSpec: the sizes and rules of a decoder-only model, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass

from trainspec.rope import RopeScaling


@dataclass(frozen=True)
class ModelSpec:
    """One model. `embed` is the hidden width, `mlp` the inner width of the feed-forward block.

    `family` names the family (`trainspec.families`) that defines its weights and its forward pass.
    """

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
    family: str = "llama"
