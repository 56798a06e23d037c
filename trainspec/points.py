"""The activation points of a run: where a trace may record an activation and its gradient.

`LAYER_POINTS` are those that a layer may have, with their shapes. A family lists in `Family.within_layer` which of them its
layers have, and where they stand between its modules; a method adds its own (`MethodSpec.points`). In a trace a layer's
point is `layers.{i}.NAME`.
"""

from __future__ import annotations

from dataclasses import dataclass

# The logical axes of an activation after the examples. `positions` are those of the tokens, after a prompt's virtual ones.
Axes = tuple[str, ...]

LAYER_POINTS: dict[str, Axes] = {
    # The norm of the layer's input, and its projections.
    "input_norm": ("positions", "embed"),
    "query": ("positions", "heads", "head_dim"),
    "key": ("positions", "kv_heads", "head_dim"),
    "value": ("positions", "kv_heads", "head_dim"),
    # Queries and keys after the norms of each head, in a family that has these.
    "query_norm": ("positions", "heads", "head_dim"),
    "key_norm": ("positions", "kv_heads", "head_dim"),
    # After the rotary embedding.
    "rotated_query": ("positions", "heads", "head_dim"),
    "rotated_key": ("positions", "kv_heads", "head_dim"),
    # The values of each head, weighted by the softmax: what the output projection takes.
    "mixed": ("positions", "heads", "head_dim"),
    # What is added to the residual stream.
    "attention": ("positions", "embed"),
    "post_norm": ("positions", "embed"),
    "gate": ("positions", "mlp"),
    "up": ("positions", "mlp"),
    # act(gate) * up: what the last projection of the MLP takes.
    "product": ("positions", "mlp"),
    # What is added to the residual stream, and the stream after it.
    "mlp": ("positions", "embed"),
    "block": ("positions", "embed"),
}
# Two runs may turn these by another angle, the same for both, and compute the same: only their products matter.
TURNED = ("rotated_query", "rotated_key")
# Before the first layer and after the last.
END_POINTS: dict[str, Axes] = {
    "embedding": ("positions", "embed"),
    "norm": ("positions", "embed"),
    "logits": ("positions", "vocab"),
}


@dataclass(frozen=True)
class Point:
    """A place where activations may be recorded: [examples, *axes].

    `layer` is None outside of the layers. A method's point is named after the module that it is in: `MODULE.lora_A`.
    """

    name: str
    axes: Axes
    layer: int | None = None

    @property
    def full_name(self) -> str:
        """The point's name in a trace."""
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"
