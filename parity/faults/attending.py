"""Faults of attention: a window that is not asked for, a table that ends, masks of others, kv heads shared otherwise."""

from __future__ import annotations

from parity.faults.fault import Fault, Where, at_point
from parity.faults.written_out import ATTENTION, ATTENTION_WRITTEN_OUT
from parity.runs.edit import Edit

# Positions of a document that the window, and the table, of a fault hold; the set-ups' documents are longer.
REACH = 12
ATTEND = ("jaxtrain.families.llama:Attention.__call__", "self.attend(__q, __k, __v, __visible)")
REPEAT = (f"{ATTENTION}:attention", "__x.repeat_interleave(__times, dim=1)")

FAULTS = (
    Fault(
        name="window-where-none-is",
        imitates="a query sees a window of the keys before it, though the model has none",
        source="huggingface/transformers#38002 (sliding_window applied with use_sliding_window false)",
        cause="attention-window",
        where=at_point("mixed"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.decoder:Decoder.visible",
                    "self.spec.window",
                    str(REACH),
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.attention.visible:Visible.mask",
                    "attention_mask(__segments)",
                    f"in_window(__it, self.positions_BT, {REACH})",
                ),
            ),
        },
    ),
    Fault(
        name="rotary-table-ends",
        imitates="positions beyond the end of a rotary table have the angles of its last row",
        source="microsoft/onnxruntime#27597, vllm-project/vllm-ascend#1266 (tables shorter than the context)",
        cause="rotation-range",
        where=at_point("rotated_query"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.layers:rotary_tables",
                    "__positions[..., None].astype(__dtype)",
                    f"jnp.minimum(__positions, {REACH - 1})[..., None].astype(__dtype)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.layers:RotaryTables.forward",
                    "__positions[..., None]",
                    f"__positions.clamp(max={REACH - 1})[..., None]",
                ),
            ),
        },
    ),
    Fault(
        name="segments-dropped",
        imitates="a kernel is not given the segments: every token sees all before it, of any document, and padding",
        source="AI-Hypercomputer/maxtext#4476",
        cause="document-mask",
        where=at_point("mixed"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.layers:attention_mask",
                    "__causal & (__own | __virtual)",
                    "__causal & (__own | True)",
                ),
            ),
            "torch": (
                Edit("torchtrain.layers:attention_mask", "__same.tril()", "torch.ones_like(__same).tril()"),
            ),
        },
        setup="packed",
    ),
    Fault(
        name="causal-mask-without-the-prefix",
        imitates="the causal mask is aligned to the first key, not to the last: it is not offset by the prefix",
        source="jax.nn.dot_product_attention's is_causal is tril(T, S); LMCache/LMCache#1152",
        cause="causal-mask",
        where=at_point("mixed"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.attention.visible:Visible.mask",
                    "jnp.pad(__mask, __widths, constant_values=True)",
                    "jnp.tril(__it)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.attention.visible:Visible.mask",
                    "F.pad(__visible, __widths, value=True)",
                    "__it.tril()",
                ),
            ),
        },
        setup="prefix",
    ),
    Fault(
        name="mask-of-the-first-slice",
        imitates="the attention mask of the first microbatch is kept and used for the others as well",
        source="huggingface/candle#3582 (only the first row of a batch has its mask); facebookresearch/xformers#66",
        cause="padding-mask",
        where=at_point("mixed"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._gradients.add",
                    "self._passes.gradients(__weights, __slots, __batch, __step, record_activations=__records)",
                    "self._passes.gradients(\n"
                    "    __weights, __slots, __batch | {'segments': stacked['segments'][0]}, __step,\n"
                    "    record_activations=__records,\n"
                    ")",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.step:_Microbatches.forward",
                    "inputs_of(__microbatch, __run, is_recorded=__recorded)",
                    "__it | {'visible': inputs_of(self._microbatches[0], __run, is_recorded=__recorded)['visible']}",
                ),
            ),
        },
    ),
    Fault(
        name="kv-heads-shifted",
        imitates="each group of query heads has the next group's keys and values",
        source="PSAL-POSTECH/ONNXim#33, alibaba/ChatLearn#277",
        cause="kv-grouping",
        where=at_point("mixed"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.attention.reference:attend",
                    "K = k_BTKD.shape[2]",
                    "K = k_BTKD.shape[2]\nk_BTKD, v_BTKD = jnp.roll(k_BTKD, 1, 2), jnp.roll(v_BTKD, 1, 2)",
                ),
            ),
            "torch": (*ATTENTION_WRITTEN_OUT, Edit(*REPEAT, "__it.roll(__times, 1)")),
        },
    ),
    Fault(
        name="first-kv-head-for-all",
        imitates="all query heads share the first kv head",
        source="PSAL-POSTECH/ONNXim#33 (all heads collapse onto kv head 0); GQA, arXiv 2305.13245",
        cause="kv-grouping",
        where=at_point("mixed"),
        edits={
            "jax": (Edit(*ATTEND, "self.attend(__q, __k[:, :, :1], __v[:, :, :1], __visible)"),),
            "torch": (
                *ATTENTION_WRITTEN_OUT,
                Edit(*REPEAT, "__x[:, :1].expand(-1, __x.shape[1] * __times, -1, -1)"),
            ),
        },
    ),
    Fault(
        name="log-sum-exp-detached",
        imitates="parts of attention are joined by a log-sum-exp that has no gradient",
        source="jax.nn.dot_product_attention(return_residual=True) stops it; SHI-Labs/NATTEN#299",
        cause="attention-gradient",
        where=Where("activation_gradient", r"layers\.1\.rotated_key"),
        edits={
            "jax": (
                Edit("jaxtrain.attention.reference:attend", "", "from jax import lax, nn"),
                Edit(
                    "jaxtrain.attention.reference:attend",
                    "softmax(__scores)",
                    "jnp.exp(__scores - lax.stop_gradient(nn.logsumexp(__scores, axis=-1, keepdims=True)))",
                ),
            ),
            "torch": (
                *ATTENTION_WRITTEN_OUT,
                Edit(
                    f"{ATTENTION}:attention",
                    "__scores.softmax(-1)",
                    "(__scores - __scores.logsumexp(-1, keepdim=True).detach()).exp()",
                ),
            ),
        },
    ),
)
