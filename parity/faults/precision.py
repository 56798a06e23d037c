"""Faults of precision: values rounded to bfloat16 that the contract keeps wider.

JAX's are written with reduce_precision, as XLA may remove a cast to bfloat16 and back.
"""

from __future__ import annotations

from parity.faults.fault import Fault, Where, at_point
from parity.faults.written_out import ATTENTION, ATTENTION_WRITTEN_OUT
from parity.runs.edit import Edit

ROUNDING = "from parity.faults.substitutes.torch_gradients import round_gradients"

FAULTS = (
    Fault(
        name="start-rounded-to-bf16",
        imitates="weights are rounded to bfloat16 when they are loaded",
        source="huggingface/sentence-transformers#3773, Physical-Intelligence/openpi#989",
        cause="rounded-start",
        where=Where("initial", r"model\.embed_tokens\.weight", 0),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.weights:_native",
                    "jax.device_put(__shard, __device)",
                    'jax.device_put(__shard.astype("bfloat16").astype(dtype), __device)',
                ),
            ),
            "torch": (
                Edit("torchtrain.weights:allocate", "torch.from_numpy(__array)", "__it.bfloat16()"),
                Edit("torchtrain.step:init_state", '__policy == "bf16"', "False"),
            ),
        },
    ),
    Fault(
        name="softmax-in-bf16",
        imitates="attention's softmax is computed in bfloat16",
        source="apple/axlearn#18, huggingface/transformers#24519",
        cause="softmax-precision",
        where=at_point("mixed"),
        below_bound_in=("bf16",),
        edits={
            "jax": (
                Edit("jaxtrain.attention.reference:attend", "", "from jax import lax"),
                Edit(
                    "jaxtrain.attention.reference:attend",
                    "softmax(__scores)",
                    "lax.reduce_precision(softmax(lax.reduce_precision(__scores, 8, 7)), 8, 7)",
                ),
            ),
            "torch": (
                *ATTENTION_WRITTEN_OUT,
                Edit(
                    f"{ATTENTION}:attention",
                    "__scores.softmax(-1)",
                    "__scores.bfloat16().softmax(-1).to(__scores.dtype)",
                ),
            ),
        },
    ),
    Fault(
        name="loss-in-bf16",
        imitates="the loss is computed from logits in bfloat16",
        source="google-deepmind/optax#1020, Modalities/modalities#464",
        cause="loss-precision",
        where=Where("loss", "loss_sum"),
        below_bound_in=("bf16",),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.loss:target_loss",
                    "__logits.astype(__wide)",
                    "lax.reduce_precision(__logits, 8, 7)",
                ),
            ),
            "torch": (
                Edit("torchtrain.loss:target_loss", "__logits.to(__wide)", "__logits.to(torch.bfloat16)"),
            ),
        },
    ),
    Fault(
        name="accumulated-in-bf16",
        imitates="gradients of microbatches are summed in bfloat16",
        source="deepspeedai/DeepSpeed#1800, #2352, #2768",
        cause="rounded-sum",
        where=Where("gradient", r"lm_head\.weight"),
        below_bound_in=("bf16",),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._gradients",
                    "jax.tree.map(jnp.add, __total, __gradients)",
                    "jax.tree.map(lambda a, g: lax.reduce_precision(a + g, 8, 7), __total, __gradients)",
                ),
            ),
            "torch": (
                # What is added up when the next microbatch comes, and in the end.
                Edit(
                    "torchtrain.step:_Microbatches.loss",
                    "__sum += __loss.detach()",
                    f"__it\n{ROUNDING}\nround_gradients(self._state.model)",
                ),
                Edit(
                    "torchtrain.step:train_step",
                    "__state.engine.accumulate(__rows)",
                    f"__it\n{ROUNDING}\nround_gradients(__state.model)",
                ),
            ),
        },
    ),
)
