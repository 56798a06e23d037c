"""Faults of precision: what is rounded to bfloat16 where the contract says wider.

JAX's are written with reduce_precision: XLA may leave out a cast to bfloat16 and back.
"""

from __future__ import annotations

from parity.faults.fault import Fault, Where
from parity.faults.loss import ADD, STEP, TORCH_STEP
from parity.faults.written_out import torch_attention
from parity.plant import Edit

FAULTS = (
    Fault(
        name="start-rounded-to-bf16",
        imitates="weights go through bfloat16 when they are loaded",
        source="huggingface/sentence-transformers#3773, Physical-Intelligence/openpi#989",
        where=Where("initial", r"model\.embed_tokens\.weight", 0),
        jax=(
            Edit(
                "jaxtrain.weights",
                "return parts[key]",
                'return parts[key].astype("bfloat16").astype(dtype)',
            ),
        ),
        torch=(Edit("torchtrain.weights", "torch.from_numpy(array)", "torch.from_numpy(array).bfloat16()"),),
    ),
    Fault(
        name="softmax-in-bf16",
        imitates="attention's softmax is not widened",
        source="apple/axlearn#18, huggingface/transformers#24519",
        where=Where("activation", r"layers\.0\.attention"),
        jax=(
            Edit(
                "jaxtrain.model",
                "jax.nn.softmax(scores, axis=-1)",
                "lax.reduce_precision(jax.nn.softmax(lax.reduce_precision(scores, 8, 7), axis=-1), 8, 7)",
            ),
        ),
        torch=torch_attention(("scores.softmax(-1)", "scores.bfloat16().softmax(-1).to(v.dtype)")),
    ),
    Fault(
        name="loss-in-bf16",
        imitates="logits are not widened for the loss",
        source="google-deepmind/optax#1020, Modalities/modalities#464",
        where=Where("loss", "loss_sum"),
        jax=(
            Edit(
                "jaxtrain.loss",
                "wide = logits[:, :-1].astype(jnp.promote_types(jnp.float32, logits.dtype))",
                "wide = jax.lax.reduce_precision(logits[:, :-1], 8, 7)",
            ),
        ),
        torch=(
            Edit(
                "torchtrain.loss",
                "logits.to(torch.promote_types(logits.dtype, torch.float32))",
                "logits.to(torch.bfloat16)",
            ),
        ),
    ),
    Fault(
        name="accumulated-in-bf16",
        imitates="gradients of microbatches are added up in bfloat16",
        source="deepspeedai/DeepSpeed#1800, #2352, #2768",
        where=Where("gradient", r"lm_head\.weight"),
        jax=(
            Edit(
                STEP,
                ADD,
                "sums = jax.tree.map(lambda a, g: lax.reduce_precision(a + g, 8, 7), totals[2], gradients)",
            ),
        ),
        torch=(
            # What is added up when the next microbatch comes, and in the end.
            Edit(
                TORCH_STEP,
                "self.loss_sum += part_loss.detach()",
                "self.loss_sum += part_loss.detach()\n"
                "        for p in _trainable(self._state.model).values():\n"
                "            p.grad = None if p.grad is None else p.grad.copy_(p.grad.bfloat16())",
            ),
            Edit(
                TORCH_STEP,
                "state.engine.accumulate(rows)",
                "state.engine.accumulate(rows)\n"
                "        for p in _trainable(state.model).values():\n"
                "            p.grad.copy_(p.grad.bfloat16())",
            ),
        ),
    ),
)
