"""Faults of virtual tokens: where a prefix or a prompt enters the model, what sees it, and what trains it."""

from __future__ import annotations

from parity.faults.fault import Fault, Where, at_point
from parity.faults.loss import TARGETS
from parity.runs.edit import Edit

FAULTS = (
    Fault(
        name="prefix-positions-from-zero",
        imitates="the tokens after a prefix start at position 0, not after its virtual tokens",
        source="XiangLi1999/PrefixTuning#40, huggingface/transformers#33852",
        cause="virtual-positions",
        where=at_point("rotated_query"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.methods.virtual_tokens:all_positions",
                    "position_shift(__method)",
                    "leading_positions(__method)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.methods.virtual_tokens:all_positions",
                    "position_shift(__method)",
                    "leading_positions(__method)",
                ),
            ),
        },
        setup="prefix",
        note="a prefix is not rotated, so positions relative to it matter: rope-all-offset has no prefix, and passes",
    ),
    Fault(
        name="prefix-masked-out",
        imitates="no token may attend to the prefix",
        source="QwenLM/ParScale#11, zai-org/ChatGLM3#359",
        cause="virtual-mask",
        where=at_point("mixed"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.attention.visible:Visible.mask",
                    "jnp.pad(__mask, __widths, constant_values=True)",
                    "jnp.pad(__mask, __widths, constant_values=False)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.attention.visible:Visible.mask",
                    "F.pad(__visible, __widths, value=True)",
                    "F.pad(__visible, __widths)",
                ),
            ),
        },
        setup="prefix",
    ),
    Fault(
        name="prefix-keys-and-values-swapped",
        imitates="each layer's keys and values in the prefix are swapped",
        source="zai-org/ChatGLM3#359, huggingface/peft#919 (the prefix is cut up in another order)",
        cause="prefix-layout",
        where=at_point("prefix_key"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.families.llama:Attention.__call__",
                    "repeated(__prefix[:, 0], __k), repeated(__prefix[:, 1], __v)",
                    "repeated(__prefix[:, 1], __k), repeated(__prefix[:, 0], __v)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.methods.prefix:attend_after_prefix",
                    "__prefix[2 * __layer], __prefix[2 * __layer + 1]",
                    "__prefix[2 * __layer + 1], __prefix[2 * __layer]",
                ),
            ),
        },
        setup="prefix",
    ),
    Fault(
        name="prefix-rotated",
        imitates="the keys of the prefix are rotated like tokens at positions 0, 1, ...",
        source="mistyreed63849/Graph-LLM#1",
        cause="prefix-rotation",
        where=at_point("prefix_key"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.decoder:Decoder.blocks",
                    "__layers = (__stacked, __probes, __virtual.prefix, __rotated)",
                    "from parity.faults.substitutes.jax_prefix import rotated\n"
                    "__layers = (__stacked, __probes, rotated(__virtual.prefix, self.spec), __rotated)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.methods.prefix:make_prefix",
                    "return __keys_and_values.unbind(0)",
                    "from parity.faults.substitutes.torch_virtual import rotated\n"
                    "return rotated(__keys_and_values, model.model.rotary_emb, tokens_1N)",
                ),
            ),
        },
        setup="prefix",
    ),
    Fault(
        name="prompt-rows-in-the-loss",
        imitates="virtual tokens get labels like padding and count as targets",
        source="huggingface/trl#4168",
        cause="virtual-labels",
        where=Where("tokens", "tokens"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.methods.virtual_tokens:all_labels",
                    "jnp.full(__rows, IGNORED)",
                    "jnp.full(__rows, 0)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.methods.virtual_tokens:all_labels",
                    "F.pad(__labels, __widths, value=IGNORED)",
                    "F.pad(__labels, __widths)",
                ),
                # Each virtual token but the first is the target of the previous one.
                Edit("trainspec.data:Batch.target_tokens", TARGETS, "__it + 2 * len(__labels)"),
            ),
        },
        setup="prompt",
    ),
    Fault(
        name="virtual-tokens-appended",
        imitates="the prompt comes after the embedded tokens",
        source="huggingface/peft#416, yeyeyeye33/SEC-Prompt#3",
        cause="virtual-place",
        where=Where("activation", "embedding"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.decoder:Decoder.embed",
                    "in_front(__rows, __x)",
                    "jnp.roll(__it, -__rows.shape[1], axis=1)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.methods.virtual_tokens:put_in_front",
                    "torch.cat((__rows, __embedded), 1)",
                    "torch.cat((__embedded, __rows), 1)",
                ),
            ),
        },
        setup="prompt",
    ),
    Fault(
        name="encoder-frozen",
        imitates="the virtual tokens' embeddings are trained, but not the encoder that reads them",
        source="bowang-lab/MedSAM#233, MaverickRen/PixelLM#30",
        cause="gradient-stopped",
        where=Where("gradient", r"prompt_encoder\.mlp_head\.4\.weight"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._bind_weights",
                    "__slots.get(__name)",
                    '(lax.stop_gradient if "mlp_head" in __name else jnp.asarray)(__slots[__name]) if __name in __slots else None',
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.methods.virtual_tokens:put_in_front",
                    "__rows = __encoder(__tokens.to(__device))",
                    "from parity.faults.substitutes.torch_virtual import with_frozen_head\n"
                    "__rows = with_frozen_head(__encoder, __tokens.to(__device))",
                ),
            ),
        },
        setup="ptuning-mlp",
    ),
)
