"""Faults of attention's fused kernels, which keep no scores: what the definition says they must not forget."""

from __future__ import annotations

from parity.faults.fault import Fault, Where, at_point
from parity.runs.edit import Edit

SCORES = "jaxtrain.attention.blocks:_Operands.scores"
GRADIENTS = "jaxtrain.attention.blocks:_gradients"
MASK = "__visible.mask(__queries, end=__end)"
NOTE = "torch's kernels are its own: there is no source of ours to edit"

FAULTS = (
    Fault(
        name="kernel-drops-segments",
        imitates="a fused kernel is not given the segments, though the mask of the definition has them",
        source="AI-Hypercomputer/maxtext#4476",
        cause="document-mask",
        where=at_point("mixed"),
        edits={
            "jax": (
                Edit(
                    SCORES,
                    MASK,
                    "jnp.broadcast_to(\n"
                    "    __queries[:, None] >= jnp.arange(__end), (len(__visible.segments_BS), len(__queries), __end)\n"
                    ")",
                ),
            )
        },
        setup="fused-packed",
        note=NOTE,
    ),
    Fault(
        name="kernel-causal-from-the-first-key",
        imitates="a fused kernel's causal mask is aligned to the first key, which is a prefix's: it has no offset",
        source="jax.nn.dot_product_attention's is_causal is tril(T, S); LMCache/LMCache#1152",
        cause="causal-mask",
        where=at_point("mixed"),
        edits={
            "jax": (
                Edit(SCORES, MASK, "__it & (__queries[:, None] >= jnp.arange(__visible.prefix + __end))"),
            )
        },
        setup="fused-prefix",
        note=NOTE,
    ),
    Fault(
        name="kernel-joins-a-detached-prefix",
        imitates="attention to a prefix and to tokens is joined by a log-sum-exp that has no gradient",
        source="jax.nn.dot_product_attention(return_residual=True) stops it; SHI-Labs/NATTEN#299",
        cause="attention-gradient",
        where=Where("activation_gradient", r"layers\.1\.prefix_key"),
        edits={
            "jax": (
                Edit(GRADIENTS, "", "from parity.faults.substitutes.jax_attention import means_of_parts"),
                Edit(
                    GRADIENTS,
                    "__shares * (__d_shares - __mean[..., None])",
                    "__shares * (__d_shares - means_of_parts(__shares, __d_shares, operands.visible.prefix))",
                ),
            )
        },
        setup="fused-prefix",
        note=NOTE,
    ),
    Fault(
        name="kernel-window-off-by-one",
        imitates="a fused kernel's window has one key more than the model's",
        source="huggingface/transformers#39408; cuDNN's window leaves out its bound, splash's has it",
        cause="attention-window",
        where=at_point("mixed"),
        edits={
            "jax": (
                Edit(SCORES, "", "from dataclasses import replace"),
                Edit(
                    SCORES,
                    MASK,
                    "replace(__visible, window=__visible.window + 1).mask(__queries, end=__end)",
                ),
            )
        },
        setup="fused-window",
        note=NOTE,
    ),
)
