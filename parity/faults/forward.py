"""Faults of the forward pass: rotary embedding, attention and its mask, norms, the MLP."""

from __future__ import annotations

from parity.faults.fault import Fault, at_point, in_every_backend
from parity.faults.written_out import ATTENTION, ATTENTION_WRITTEN_OUT
from parity.runs.edit import Edit

SAME_SEGMENT = "__own[:, :, None] == __segments[:, None, :]"
ANY_SEGMENT = "(__own[:, :, None] > 0) == (__segments[:, None, :] > 0)"
PADDING_AS_WELL = "__it | (__segments[:, None, :] == 0)"
# torchtrain's own norm, which fp64 runs have, in every precision.
OWN_NORM = Edit("torchtrain.model:build_model", '__policy == "fp64"', "True")

FAULTS = (
    Fault(
        name="rope-pairing",
        imitates="interleaved pairs are rotated, but the checkpoint has halves",
        source="huggingface/transformers#31788, karpathy/llama2.c#286",
        cause="rotation",
        where=at_point("rotated_query"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.layers:rotary_tables",
                    "jnp.concatenate([__half, __half], axis=-1)",
                    "jnp.repeat(__half, 2, axis=-1)",
                ),
                Edit(
                    "jaxtrain.layers:rotate", "jnp.split(__x, 2, axis=-1)", "(__x[..., ::2], __x[..., 1::2])"
                ),
                Edit(
                    "jaxtrain.layers:rotate",
                    "jnp.concatenate([-__second, __first], axis=-1)",
                    "jnp.stack([-__second, __first], axis=-1).reshape(*__first.shape[:-1], -1)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.layers:RotaryTables.forward",
                    "torch.cat((__half, __half), dim=-1)",
                    "__half.repeat_interleave(2, dim=-1)",
                ),
                *ATTENTION_WRITTEN_OUT,
                Edit(f"{ATTENTION}:rotated", "__x.chunk(2, dim=-1)", "(__x[..., ::2], __x[..., 1::2])"),
                Edit(
                    f"{ATTENTION}:rotated",
                    "torch.cat((-__second, __first), dim=-1)",
                    "torch.stack((-__second, __first), dim=-1).flatten(-2)",
                ),
            ),
        },
    ),
    Fault(
        name="rope-theta",
        imitates="theta is 10000 whatever the checkpoint says",
        source="google-deepmind/penzai#102, marin-community/levanter#649",
        cause="rotation",
        where=at_point("rotated_query"),
        edits=in_every_backend(Edit("trainspec.rope:inverse_frequencies", "__model.rope_theta", "10_000.0")),
    ),
    Fault(
        name="rope-key-offset",
        imitates="keys are rotated one position further than queries",
        source="huggingface/transformers#29419 (positions beside the mask); RoFormer, arXiv 2104.09864",
        cause="rotation",
        where=at_point("rotated_key"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.decoder:Decoder.blocks",
                    "__cos, __sin = rotary_tables(__spec, __positions, __dtype)",
                    "at, after = (rotary_tables(__spec, p, __dtype) for p in (__positions, __positions + 1))\n"
                    "__cos, __sin = (at[0], after[0]), (at[1], after[1])",
                ),
                Edit(
                    "jaxtrain.families.llama:Attention.__call__",
                    "rotate(__q, __cos, __sin), rotate(__k, __cos, __sin)",
                    "rotate(__q, __cos[0], __sin[0]), rotate(__k, __cos[1], __sin[1])",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.layers:RotaryTables.forward",
                    "return __angles.cos().to(__dtype), __angles.sin().to(__dtype)",
                    "after = __angles + torch.cat((self._inverse, self._inverse))\n"
                    "tables = (f(a) for a in (__angles, after) for f in (torch.cos, torch.sin))\n"
                    "return tuple(table.to(__dtype) for table in tables)",
                ),
                *ATTENTION_WRITTEN_OUT,
                Edit(f"{ATTENTION}:attention", "__tables[:2], __tables[:2]", "__tables[:2], __tables[2:]"),
            ),
        },
        note="an equal offset of queries and keys changes nothing: see rope-all-offset",
    ),
    Fault(
        name="rope-all-offset",
        imitates="every position is one too large",
        source="huggingface/transformers#29419 (positions beside the mask); RoFormer, arXiv 2104.09864",
        cause=None,
        where=None,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.decoder:Decoder.blocks",
                    "rotary_tables(__spec, __positions, __dtype)",
                    "rotary_tables(__spec, __positions + 1, __dtype)",
                ),
            ),
            "torch": (Edit("torchtrain.inputs:inputs_of", "on_device(__batch.positions)", "__it + 1"),),
        },
        note="rotary attention depends only on differences of positions: the arithmetic is the same, so it must pass",
    ),
    Fault(
        name="attention-scale",
        imitates="scores are scaled by embed / heads, which is not the head size",
        source="lucidrains/vit-pytorch#65, karpathy/ng-video-lecture#6",
        cause="attention-scale",
        where=at_point("mixed"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.families.llama:Attention.__call__",
                    "self.attend(__q, __k, __v, __visible)",
                    "self.attend(__q * (__q.shape[2] * self.head_dim / x_BSE.shape[-1]) ** 0.5, __k, __v, __visible)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.model:build_model",
                    "return __model",
                    "for layer in __model.model.layers:\n"
                    "    layer.self_attn.scaling = (spec.embed / spec.heads) ** -0.5\n"
                    "return __model",
                ),
            ),
        },
    ),
    Fault(
        name="causal-off-by-one",
        imitates="a query sees the token after it",
        source="huggingface/transformers#48745 (decoders that see future tokens)",
        cause="causal-mask",
        where=at_point("mixed"),
        edits={
            "jax": (Edit("jaxtrain.layers:attention_mask", "__query >= __key", "__query + 1 >= __key"),),
            "torch": (Edit("torchtrain.layers:attention_mask", "__same.tril()", "__same.tril(1)"),),
        },
    ),
    Fault(
        name="padding-attended",
        imitates="padding on the left is seen by the tokens after it",
        source="NVIDIA-NeMo/Automodel#3704 (36 of 150 models), huggingface/transformers#29419",
        cause="padding-mask",
        where=at_point("mixed"),
        edits={
            "jax": (Edit("jaxtrain.layers:attention_mask", SAME_SEGMENT, PADDING_AS_WELL),),
            "torch": (Edit("torchtrain.layers:attention_mask", SAME_SEGMENT, PADDING_AS_WELL),),
        },
    ),
    Fault(
        name="packed-rows-attend",
        imitates="documents packed into one example see each other",
        source="LlamaFactory#7318, MeetKai/functionary#265, meta-pytorch/torchtune#875",
        cause="document-mask",
        where=at_point("mixed"),
        edits={
            "jax": (Edit("jaxtrain.layers:attention_mask", SAME_SEGMENT, ANY_SEGMENT),),
            "torch": (Edit("torchtrain.layers:attention_mask", SAME_SEGMENT, ANY_SEGMENT),),
        },
        setup="packed",
    ),
    Fault(
        name="packed-positions-ignored",
        imitates="the model counts positions over the whole example, whatever the batch says",
        source="LlamaFactory#7318, #4224",
        cause=None,
        where=None,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.decoder:Decoder.blocks",
                    "rotary_tables(__spec, __positions, __dtype)",
                    "rotary_tables(__spec, jnp.broadcast_to(jnp.arange(__positions.shape[1]), __positions.shape), __dtype)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.inputs:inputs_of",
                    "on_device(__batch.positions)",
                    "torch.arange(__batch.positions.shape[1]).expand(__batch.positions.shape)",
                ),
            ),
        },
        setup="packed",
        note="under a block mask only differences of positions within a document matter: it must pass. A batch "
        "with such positions does show: see packed-positions-not-restarted",
    ),
    Fault(
        name="rmsnorm-eps-outside",
        imitates="eps is added to the root, not to the mean square",
        source="NVIDIA/TransformerEngine#364, fla-org/flash-linear-attention#508",
        cause="norm-epsilon",
        where=at_point("input_norm"),
        below_bound_in=("bf16",),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.layers:RMSNorm.__call__",
                    "lax.rsqrt(__mean + __eps)",
                    "1 / (jnp.sqrt(__mean) + __eps)",
                ),
            ),
            "torch": (
                OWN_NORM,
                Edit(
                    "torchtrain.layers:RMSNorm.forward",
                    "torch.rsqrt(__mean + __eps)",
                    "1 / (__mean.sqrt() + __eps)",
                ),
            ),
        },
    ),
    Fault(
        name="rmsnorm-weight-before-cast",
        imitates="the weight is multiplied before the cast to the compute type",
        source="huggingface/transformers LlamaRMSNorm against meta-llama/llama RMSNorm",
        cause=None,
        where=None,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.layers:RMSNorm.__call__",
                    "scale(rounded(normed(__x)), __weight)",
                    "scale(rounded(normed.__wrapped__(__x.astype(accumulation_dtype(__x.dtype)))), __weight).astype(__x.dtype)",
                ),
            ),
            "torch": (
                OWN_NORM,
                Edit(
                    "torchtrain.layers:RMSNorm.forward",
                    "__weight * (__x * __root)",
                    "(__weight * __x * __root).to(__x.dtype)",
                ),
            ),
        },
        note="a cast to the type that an array already has does nothing: it shows in bf16 only and must pass in fp64",
    ),
    Fault(
        name="head-norm-behind-the-rotation",
        imitates="queries and keys are rotated before they are normed, not after",
        source="karpathy/nanochat#743, allenai/OLMo#806 (either order is in use); Qwen3, arXiv 2505.09388",
        cause="head-norm-order",
        where=at_point("query_norm"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.families.llama:Attention.__call__",
                    "__q, __k = self.before_rotation(__q, __k)\n"
                    "__q, __k = rotate(__q, __cos, __sin), rotate(__k, __cos, __sin)",
                    "__q, __k = rotate(__q, __cos, __sin), rotate(__k, __cos, __sin)\n"
                    "__q, __k = self.before_rotation(__q, __k)",
                ),
            ),
            "torch": (
                *ATTENTION_WRITTEN_OUT,
                Edit(
                    f"{ATTENTION}:attention",
                    "__q, __k = normed(self, __q, __k)\n"
                    "__q, __k = rotated(__q, *__tables), rotated(__k, *__others)",
                    "__q, __k = rotated(__q, *__tables), rotated(__k, *__others)\n"
                    "__q, __k = normed(self, __q, __k)",
                ),
            ),
        },
        setup="qwen3",
    ),
    Fault(
        name="gqa-tile",
        imitates="kv heads are tiled (0 1 0 1), though each serves neighbouring query heads (0 0 1 1)",
        source="onnx/onnx#7274; GQA, arXiv 2305.13245",
        cause="kv-grouping",
        where=at_point("mixed"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.attention.reference:attend",
                    "__q.reshape(__b, __s, __kv, __heads // __kv, __d)",
                    "__q.reshape(__b, __s, __heads // __kv, __kv, __d).swapaxes(2, 3)",
                ),
                Edit(
                    "jaxtrain.attention.reference:attend",
                    'jnp.einsum("bkgqs,bskd->bqkgd", __shares, __v)',
                    "__it.swapaxes(2, 3)",
                ),
            ),
            "torch": (
                *ATTENTION_WRITTEN_OUT,
                Edit(
                    f"{ATTENTION}:attention",
                    "__x.repeat_interleave(__times, dim=1)",
                    "__x.repeat(1, __times, 1, 1)",
                ),
            ),
        },
    ),
    Fault(
        name="swiglu-swapped",
        imitates="the activation is applied to the up half, not to the gate",
        source="ml-explore/mlx-lm#767; SwiGLU, arXiv 2002.05202",
        cause="mlp-activation",
        where=at_point("product"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.layers:swiglu",
                    "rounded(jax.nn.silu(__gate)) * __up",
                    "rounded(jax.nn.silu(__up)) * __gate",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.model:build_model",
                    "return __model",
                    "for layer in __model.model.layers:\n"
                    "    layer.mlp.forward = lambda x, m=layer.mlp: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x))\n"
                    "return __model",
                ),
            ),
        },
    ),
)
