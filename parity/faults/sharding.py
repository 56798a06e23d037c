"""Faults of sharded training: sums over devices that are missing, made twice, or made over the wrong devices.

torch's parallel layers and groups are our own code, which every fault can edit. In JAX the compiler inserts the
collectives: only what our code says about sharding can be edited, so a fault is planted as its effect on the numbers.
"""

from __future__ import annotations

from parity.faults.fault import Fault, Where, at_point
from parity.runs.edit import Edit

EMBEDDING = r"model\.embed_tokens\.weight"
HEAD_GRADIENT = Where("gradient", r"lm_head\.weight")
REPLICAS_SUM = "__mesh.replicas.sum_(__gradient)"
COMPILER = "JAX has no counterpart: the compiler makes the sum over devices"
PLAIN_ONLY = "in fp32 DeepSpeed does this part: the torch edit reaches the plain engine of fp64 runs only"

FAULTS = (
    Fault(
        name="row-sum-missing",
        imitates="the output of a row-parallel layer is not summed over the tensor ranks",
        source="FlashML-org/FreeToken#429, sgl-project/sglang#14811",
        cause="tensor-sum-missing",
        where=at_point("attention"),
        edits={
            "torch": (
                Edit("torchtrain.tensor_parallel:RowLinear.forward", "_Sum.apply(__part, __peers)", "__part"),
            )
        },
        setup="tensor",
        note=COMPILER,
    ),
    Fault(
        name="row-bias-per-rank",
        imitates="a row-parallel layer adds its bias on every tensor rank, before the sum",
        source="huggingface/text-generation-inference#1036, PaddlePaddle/Paddle#35186",
        cause="bias-per-rank",
        where=at_point("attention"),
        edits={
            "torch": (
                Edit(
                    "torchtrain.tensor_parallel:RowLinear.forward",
                    "F.linear(__x, __weight)",
                    "F.linear(__x, __weight, self.bias)",
                ),
                Edit(
                    "torchtrain.tensor_parallel:RowLinear.forward",
                    "__summed if __has_none else __summed + __bias",
                    "__summed",
                ),
            )
        },
        setup="tensor",
        note=COMPILER,
    ),
    Fault(
        name="column-input-sum-missing",
        imitates="the gradient of a column-parallel layer's input is not summed over the tensor ranks",
        source="inclusionAI/AReno#496, NVIDIA/Megatron-LM#19",
        cause="tensor-gradient-sum",
        where=Where("activation_gradient", "norm"),
        edits={
            "torch": (
                Edit("torchtrain.tensor_parallel:_Copy.backward", "__peers.sum_(__gradient)", "__gradient"),
            )
        },
        setup="tensor",
        note=COMPILER,
    ),
    Fault(
        name="norm-gradient-not-reduced",
        imitates="the gradients of the norms' weights are not reduced over the tensor ranks",
        source="NVIDIA/TransformerEngine#435, NVIDIA/Megatron-LM#1446",
        cause="replicated-gradient-sum",
        where=Where("activation_gradient", r"layers\.1\.post_norm"),
        edits={
            "torch": (
                Edit(
                    "torchtrain.tensor_parallel:copy_inputs",
                    "__anatomy.attention(__layer).register_forward_pre_hook(__hook, with_kwargs=True)",
                    "__layer.input_layernorm.register_forward_pre_hook(positional)",
                ),
                Edit(
                    "torchtrain.tensor_parallel:copy_inputs",
                    "__anatomy.mlp(__layer)",
                    "__layer.post_attention_layernorm",
                ),
            )
        },
        setup="tensor",
        note=f"each rank has its share of the gradient of the norm's output, and the sum is made after the norm; {COMPILER}",
    ),
    Fault(
        name="head-norm-gradient-not-reduced",
        imitates="the norms of queries and keys get the gradient of each tensor rank's own heads only",
        source="NVIDIA-NeMo/RL#3716, NVIDIA/Megatron-LM#816",
        cause="replicated-gradient-sum",
        where=Where("gradient", r"model\.layers\.1\.self_attn\.[qk]_norm\.weight"),
        edits={
            "torch": (
                Edit(
                    "torchtrain.tensor_parallel:HeadNorm.forward",
                    "_Copy.apply(__weight, __peers)",
                    "__weight",
                ),
            )
        },
        setup="tensor-qwen3",
        note=COMPILER,
    ),
    Fault(
        name="vocab-offset-in-embedding",
        imitates="every shard of the embedding after the first starts one row late",
        source="hpcaitech/ColossalAI#242, pytorch/torchtitan#4637",
        cause="vocabulary-offset",
        where=Where("activation", "embedding"),
        edits={
            "torch": (
                Edit(
                    "torchtrain.tensor_parallel:VocabEmbedding.__init__",
                    "__peers.index * __rows",
                    "__peers.index * (__rows + 1)",
                ),
            )
        },
        setup="tensor",
        note="JAX has no counterpart: rows are looked up by their global number",
    ),
    Fault(
        name="vocab-offset-in-loss",
        imitates="every shard of the logits after the first looks for its targets one column late",
        source="apple/ml-cross-entropy#59, #42",
        cause="vocabulary-offset",
        where=Where("loss", "loss_sum"),
        later_in={"bf16": Where("activation_gradient", "logits")},
        edits={
            "jax": (
                Edit(
                    "jaxtrain.loss:target_loss",
                    "__vocab = lax.broadcasted_iota(__dtype, __logits.shape, __dim)",
                    "__it\n__vocab = __vocab + (__vocab >= __logits.shape[-1] // 2)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.loss:_VocabCrossEntropy.forward",
                    "__peers.index * __columns",
                    "__peers.index * (__columns + 1)",
                ),
            ),
        },
        setup="tensor",
    ),
    Fault(
        name="lora-factor-not-reduced",
        imitates="the gradient of an adapter factor that all tensor ranks hold is not reduced over them",
        source="modelscope/mcore-bridge#173, radixark/miles#2723",
        cause="replicated-gradient-sum",
        where=Where("gradient", r"base_model\.model\.model\.layers\.1\.self_attn\.v_proj\.lora_A\.weight"),
        edits={
            "torch": (
                Edit(
                    "torchtrain.tensor_parallel:WholeLinear.forward",
                    "_Copy.apply(__weight, __peers)",
                    "__weight",
                ),
            )
        },
        setup="tensor-adapter",
        note=COMPILER,
    ),
    Fault(
        name="dropout-repeated-on-ranks",
        imitates="every tensor rank draws the dropout mask of the first one's features",
        source="ecmwf/anemoi-core#595, NVIDIA/Fuser#3123",
        cause="dropout-on-ranks",
        where=at_point("down_proj.lora_A"),
        edits={
            "torch": (Edit("torchtrain.methods.low_rank:replace_targets", "__peers.index * __features", "0"),)
        },
        setup="tensor-adapter",
        note="JAX has no counterpart: a mask is drawn by the global number of a feature",
    ),
    Fault(
        name="reduced-over-wrong-group",
        imitates="gradients are summed over the tensor ranks instead of the replicas",
        source="NVIDIA/Megatron-LM#779, inclusionAI/AReno#496",
        cause="reduction-group",
        where=HEAD_GRADIENT,
        edits={
            "torch": (
                Edit("torchtrain.engines.plain:PlainEngine.accumulate", "__mesh.replicas", "__mesh.tensor"),
            )
        },
        setup="data-tensor",
        fp64_only=("torch",),
        note=f"{COMPILER}; {PLAIN_ONLY}",
    ),
    Fault(
        name="averaged-over-replicas",
        imitates="shares of one batch's gradient are averaged over the replicas, not summed",
        source="facebookresearch/fairseq#494, pytorch/pytorch#37359",
        cause="averaged-over-ranks",
        where=HEAD_GRADIENT,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._gradients",
                    "return StepGradients(__loss, __tokens, global_norm(__gradients), __gradients, __seen, __by_probe)",
                    "__gradients = {n: g / self.recipe.plan.replicas for n, g in __gradients.items()}\n__it",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.engines.plain:PlainEngine.accumulate",
                    REPLICAS_SUM,
                    "__it.div_(__mesh.replicas.size)",
                ),
                Edit(
                    "torchtrain.engines.deepspeed:DeepSpeedEngine.__init__", "float(__plan.replicas)", "1.0"
                ),
            ),
        },
        setup="data",
    ),
    Fault(
        name="rows-repeated-on-a-rank",
        imitates="one rank trains on another's examples",
        source="openspeech-team/openspeech#149, karpathy/llama2.c#522",
        cause="rows-of-a-rank",
        where=Where("activation", "embedding"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.feed:Feeder._fed",
                    "np.stack([getattr(__part, __field) for __part in __parts])",
                    "np.stack([np.tile(a[: len(a) // 2], (2, 1)) if __field == 'input_ids' else a\n"
                    "          for __part in __parts for a in [getattr(__part, __field)]])",
                ),
            ),
            "torch": (Edit("torchtrain.step:_own_examples", "__shares[__replicas.index]", "__shares[0]"),),
        },
        setup="data",
        note="in JAX only the input tokens are repeated, as its number of targets would show first",
    ),
    Fault(
        name="reduced-in-bf16",
        imitates="gradients are summed over the replicas in bfloat16, not in float32 as asked for",
        source="deepspeedai/DeepSpeed#3370, NVIDIA/Megatron-LM#502",
        cause="rounded-sum",
        where=HEAD_GRADIENT,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.weight_ops:_backward",
                    "operation.weight_gradient(__dy, __x, __like)",
                    "lax.reduce_precision(__it, 8, 7)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.engines.plain:PlainEngine.accumulate",
                    REPLICAS_SUM,
                    "__gradient.copy_(__mesh.replicas.sum_(__gradient.bfloat16()))",
                ),
                Edit(
                    "torchtrain.engines.deepspeed:deepspeed_config",
                    "return __config",
                    '__config["communication_data_type"] = "bf16"\nreturn __config',
                ),
            ),
        },
        setup="data",
        below_bound_in=("bf16",),
        note="in JAX each layer's gradient is rounded as it leaves the layer: the sum over devices is the compiler's",
    ),
    Fault(
        name="clip-by-shard-norm",
        imitates="each tensor rank clips by the norm of its own shards",
        source="pytorch/pytorch#72548, meta-pytorch/torchtune#2420",
        cause="clip-scope",
        where=Where("moment1", EMBEDDING),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._update",
                    "__gradients = clip(__gradients, __norm, max_norm=__max)",
                    "from parity.faults.substitutes.jax_sharding import norm_of_own_shards\n"
                    "__gradients = clip(__gradients, norm_of_own_shards(__gradients, shardings), max_norm=__max)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.engines.plain:PlainEngine.step",
                    "clip(__gradients, __norm, max_norm=__max)",
                    "clip(__gradients, global_norm(__gradients), max_norm=__max)",
                ),
            ),
        },
        setup="tensor",
        fp64_only=("torch",),
        note=f"each rank's shards have their own factor, so no single clip factor explains the moments; {PLAIN_ONLY}",
    ),
    Fault(
        name="optimizer-shard-not-updated",
        imitates="the moments of one rank's shard are not updated",
        source="deepspeedai/DeepSpeed#2058 (a fraction of the weights is trained)",
        cause="stale-shard",
        where=Where("moment1", EMBEDDING),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._update",
                    "__deltas, __next = self.optimizer.update(__gradients, __moments, __weights, rates=__rates)",
                    "from parity.faults.substitutes.jax_sharding import with_a_stale_shard\n"
                    "__it\n"
                    "__next = with_a_stale_shard(__moments, __next, shardings)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.engines.deepspeed:DeepSpeedEngine.__init__",
                    "self.loss_scale = __replicas",
                    "if mesh.replicas.index == 0:\n    optimizer.step = lambda *args, **more: None\n__it",
                ),
            ),
        },
        setup="zero1",
        note="in fp64 torch has no split optimizer",
    ),
)
