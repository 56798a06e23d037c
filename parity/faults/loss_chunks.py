"""Faults of the loss in chunks: a chunk that is left out, and means of chunks. Where logits are recorded there are no chunks."""

from __future__ import annotations

from parity.faults.fault import Fault, Where
from parity.runs.edit import Edit

FAULTS = (
    Fault(
        name="loss-chunk-left-out",
        imitates="the last chunk of each row's tokens is left out of the loss, as the row is no multiple of the chunk",
        source="NVIDIA-NeMo/Automodel#3803 (losses of one chunk returned for all)",
        cause="loss-mask",
        where=Where("loss", "loss_sum"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.loss_chunks:_loss_and_gradients.loss",
                    "return head.loss(__bound, __x, __targets, __point)",
                    "own_sum, own_count = head.loss(__bound, __x, __targets, __point)\n"
                    "return own_sum * (first + head.chunk < T), own_count",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.loss_chunks:HeadLoss.chunk_loss",
                    "target_loss(__logits, __targets, tensor=__peers)[0]",
                    "__it * (first + __targets.shape[1] < positions)",
                ),
            ),
        },
        setup="chunked",
    ),
    Fault(
        name="chunk-count-for-the-mean",
        imitates="each chunk's gradient is divided by the chunk's own target tokens, and the chunks are averaged",
        source="NVIDIA-NeMo/Automodel#3803, #3804",
        cause="mean-of-means",
        # The reported loss is right.
        where=Where("gradient", r"lm_head\.weight"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.loss_chunks:_loss_and_gradients.add",
                    "__own, (__gradients, __dx) = loss_and_gradients(__zeros, __x, __targets, __first)",
                    "__it\n"
                    "part = jnp.sum(targets_BT != IGNORED) / (jnp.maximum(__own[1], 1) * math.ceil(T / head.chunk))\n"
                    "__gradients, __dx = jax.tree.map(lambda g: (g * part).astype(g.dtype), (__gradients, __dx))",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.loss_chunks:_ChunkedLoss.forward",
                    "__loss / expected.divisor",
                    "__it * (expected.targets_BT >= 0).sum()"
                    " / ((expected.targets_BT[:, here] >= 0).sum().clamp(min=1) * -(-positions // expected.chunk))",
                ),
            ),
        },
        setup="chunked",
    ),
)
