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
    # The rules that not every family has.
    rotary_share: float = 1.0  # of each head, the elements that are rotated: the first ones
    unrotated: tuple[int, ...] = ()  # layers whose queries and keys are not rotated
    window: int | None = None  # how many positions a query sees, its own included; None: all before it

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated, in pairs."""
        return int(self.head_dim * self.rotary_share)
