"""Faults of sharded training: sums over devices that are missing, made twice, or made over the wrong devices.

torch's layers and groups are our own, so each has its place there. Under JAX the compiler puts the collectives in: a
fault has a place only where our code says what is split, and then it is planted as what it does to the numbers.
"""

from __future__ import annotations

from parity.faults.fault import Fault, Where
from parity.plant import Edit

STEP, LOSS, LAYERS = "jaxtrain.step", "jaxtrain.loss", "jaxtrain.tensor"
TORCH_TENSOR, TORCH_PARALLEL, TORCH_ZERO = "torchtrain.tensor", "torchtrain.parallel", "torchtrain.zero"
TORCH_STEP, TORCH_METHODS = "torchtrain.step", "torchtrain.methods"
FIRST_ATTENTION = Where("activation", r"layers\.0\.attention")
EMBEDDING = r"model\.embed_tokens\.weight"
HEAD_GRADIENT = Where("gradient", r"lm_head\.weight")
ROW_SUM = "summed = _Sum.apply(F.linear(input, self.weight), self._peers)"
REPLICAS_SUM = "self._mesh.replicas.sum_(parameter.grad)"
GRADIENTS = 'gradients = constrained(gradients, self.layout.of["gradients"])'
COMPILER = "JAX has no place for it: the compiler makes the sum over devices"
PLAIN_ONLY = "in fp32 DeepSpeed does this part: the torch edit reaches the plain engine of fp64 runs only"
# Each device's own norm, though it is said to be that of all of them.
LOCAL_NORM = (
    "jax.shard_map(global_norm, mesh=next(iter(part.values())).mesh, in_specs=({n: part[n].spec for n in gradients},), "
    "out_specs=jax.sharding.PartitionSpec(), check_vma=False)(gradients)"
)
# The second half of every dimension that fsdp splits stays as it was.
STALE_SHARD = """        def stale(name, old, new):
            dim = next((d for d, axes in enumerate(part[name].spec) if axes and "fsdp" in axes), None)
            if dim is None:
                return new
            late = lax.broadcasted_iota(int, new.shape, dim) >= new.shape[dim] // 2
            return jnp.where(late, old, new)

        next_moments = Moments(
            *({n: stale(n, o[n], m[n]) for n in m} for o, m in zip(moments, next_moments, strict=True))
        )
"""

FAULTS = (
    Fault(
        name="row-sum-missing",
        imitates="the output of a row-parallel layer is not summed over the tensor ranks",
        source="FlashML-org/FreeToken#429, sgl-project/sglang#14811",
        where=FIRST_ATTENTION,
        jax=None,
        torch=(Edit(TORCH_TENSOR, ROW_SUM, "summed = F.linear(input, self.weight)"),),
        setup="tensor",
        note=COMPILER,
    ),
    Fault(
        name="row-bias-per-rank",
        imitates="a row-parallel layer adds its bias on every tensor rank, before the sum",
        source="huggingface/text-generation-inference#1036, PaddlePaddle/Paddle#35186",
        where=FIRST_ATTENTION,
        jax=None,
        torch=(
            Edit(TORCH_TENSOR, ROW_SUM, ROW_SUM.replace("self.weight)", "self.weight, self.bias)")),
            Edit(TORCH_TENSOR, "return summed if self.bias is None else summed + self.bias", "return summed"),
        ),
        setup="tensor",
        note=COMPILER,
    ),
    Fault(
        name="column-input-sum-missing",
        imitates="the gradient of a column-parallel layer's input is not summed over the tensor ranks",
        source="inclusionAI/AReno#496, NVIDIA/Megatron-LM#19",
        where=Where("activation_gradient", "norm"),
        jax=None,
        torch=(
            Edit(
                TORCH_TENSOR,
                "return ctx.peers.sum_(grads[0].clone(memory_format=torch.contiguous_format)), None",
                "return grads[0], None",
            ),
        ),
        setup="tensor",
        note=COMPILER,
    ),
    Fault(
        name="norm-gradient-not-reduced",
        imitates="the weights of the norms get each tensor rank's own gradient, and are not reduced over them",
        source="NVIDIA/TransformerEngine#435, NVIDIA/Megatron-LM#1446",
        where=Where("gradient", r"model\.layers\.1\.post_attention_layernorm\.weight"),
        jax=None,
        torch=(
            Edit(
                TORCH_TENSOR,
                "layer.self_attn.register_forward_pre_hook(keyword, with_kwargs=True)",
                "layer.input_layernorm.register_forward_pre_hook(positional)",
            ),
            Edit(
                TORCH_TENSOR,
                "layer.mlp.register_forward_pre_hook(positional)",
                "layer.post_attention_layernorm.register_forward_pre_hook(positional)",
            ),
        ),
        setup="tensor",
        note=COMPILER,
    ),
    Fault(
        name="vocab-offset-in-embedding",
        imitates="each further shard of the embedding starts one row late",
        source="hpcaitech/ColossalAI#242, pytorch/torchtitan#4637",
        where=Where("activation", "embedding"),
        jax=None,
        torch=(
            Edit(
                TORCH_TENSOR,
                "self._first = peers.index * self.num_embeddings",
                "self._first = peers.index * (self.num_embeddings + 1)",
            ),
        ),
        setup="tensor",
        note="JAX has no place for it: rows are looked up by their global number",
    ),
    Fault(
        name="vocab-offset-in-loss",
        imitates="each further shard of the logits looks for its targets one column late",
        source="apple/ml-cross-entropy#59, #42",
        where=Where("loss", "loss_sum"),
        jax=(
            Edit(
                LOSS,
                "vocab = lax.broadcasted_iota(targets.dtype, wide.shape, wide.ndim - 1)",
                "vocab = lax.broadcasted_iota(targets.dtype, wide.shape, wide.ndim - 1)\n"
                "    vocab = vocab + (vocab >= wide.shape[-1] // 2)",
            ),
        ),
        torch=(
            Edit(
                TORCH_TENSOR,
                "local_T = targets_T - peers.index * logits_TV.shape[-1]",
                "local_T = targets_T - peers.index * (logits_TV.shape[-1] + 1)",
            ),
        ),
        setup="tensor",
    ),
    Fault(
        name="lora-factor-not-reduced",
        imitates="the factor of an adapter that all tensor ranks hold gets each rank's own gradient",
        source="modelscope/mcore-bridge#173, radixark/miles#2723",
        where=Where("gradient", r"base_model\.model\.model\.layers\.1\.self_attn\.v_proj\.lora_A\.weight"),
        jax=None,
        torch=(
            Edit(
                TORCH_TENSOR,
                "F.linear(input, _Copy.apply(self.weight, self._peers))",
                "F.linear(input, self.weight)",
            ),
        ),
        setup="tensor-adapter",
        note=COMPILER,
    ),
    Fault(
        name="dropout-repeated-on-ranks",
        imitates="every tensor rank draws the dropout mask of the first one's features",
        source="ecmwf/anemoi-core#595, NVIDIA/Fuser#3123",
        where=Where("activation", r"layers\.0\.mlp"),
        jax=None,
        torch=(
            Edit(
                TORCH_METHODS,
                "point.first_feature[module] = tensor.index * base.in_features",
                "point.first_feature[module] = 0",
            ),
        ),
        setup="tensor-adapter",
        note="JAX has no place for it: a mask is drawn by the global number of a feature",
    ),
    Fault(
        name="reduced-over-wrong-group",
        imitates="gradients are summed over the tensor ranks where those with other rows are meant",
        source="NVIDIA/Megatron-LM#779, inclusionAI/AReno#496",
        where=HEAD_GRADIENT,
        jax=None,
        torch=(Edit(TORCH_PARALLEL, REPLICAS_SUM, "self._mesh.tensor.sum_(parameter.grad)"),),
        setup="data-tensor",
        fp64_only=("torch",),
        note=f"{COMPILER}; {PLAIN_ONLY}",
    ),
    Fault(
        name="averaged-over-replicas",
        imitates="shares of one batch's gradient are averaged over the replicas, not summed",
        source="facebookresearch/fairseq#494, pytorch/pytorch#37359",
        where=HEAD_GRADIENT,
        jax=(
            Edit(
                STEP,
                GRADIENTS,
                GRADIENTS.replace(
                    "(gradients,", "({n: g / self.recipe.plan.replicas for n, g in gradients.items()},"
                ),
            ),
        ),
        torch=(
            Edit(TORCH_PARALLEL, REPLICAS_SUM, f"{REPLICAS_SUM}.div_(self._mesh.replicas.size)"),
            Edit(TORCH_ZERO, "self.loss_scale = float(recipe.plan.replicas)", "self.loss_scale = 1.0"),
        ),
        setup="data",
    ),
    Fault(
        name="rows-repeated-on-a-rank",
        imitates="one rank trains on another's rows",
        source="openspeech-team/openspeech#149, karpathy/llama2.c#522",
        where=Where("activation", "embedding"),
        jax=(
            Edit(
                STEP,
                "np.stack([getattr(part, f) for part in parts])",
                "np.stack([np.tile(a[: len(a) // 2], (2, 1)) if f == 'input_ids' else a\n"
                "                          for part in parts for a in [getattr(part, f)]])",
            ),
        ),
        torch=(
            Edit(
                TORCH_STEP,
                "return batch.split(replicas.size)[replicas.index]",
                "return batch.split(replicas.size)[0]",
            ),
        ),
        setup="data",
        note="in JAX the input tokens alone are repeated: its count of targets would show before",
    ),
    Fault(
        name="reduced-in-bf16",
        imitates="gradients are summed over the replicas in bfloat16 where float32 was asked for",
        source="deepspeedai/DeepSpeed#3370, NVIDIA/Megatron-LM#502",
        where=HEAD_GRADIENT,
        jax=(
            Edit(
                LAYERS,
                "by_weight = weight_gradient(dy, x, value, place.dtype)",
                "by_weight = lax.reduce_precision(weight_gradient(dy, x, value, place.dtype), 8, 7)",
            ),
        ),
        torch=(
            Edit(
                TORCH_PARALLEL,
                REPLICAS_SUM,
                "parameter.grad.copy_(self._mesh.replicas.sum_(parameter.grad.bfloat16()))",
            ),
            Edit(
                TORCH_ZERO,
                '"zero_allow_untested_optimizer": True,',
                '"zero_allow_untested_optimizer": True, "communication_data_type": "bf16",',
            ),
        ),
        setup="data",
        note="in JAX each layer's gradient is rounded as it leaves the layer: the sum over devices is the compiler's",
    ),
    Fault(
        name="clip-by-shard-norm",
        imitates="each tensor rank clips by the norm of its own shards",
        source="pytorch/pytorch#72548, meta-pytorch/torchtune#2420",
        where=Where("moment1", EMBEDDING),
        jax=(
            Edit(
                STEP,
                "gradients = clip(gradients, norm, max_norm",
                f"gradients = clip(gradients, {LOCAL_NORM}, max_norm",
            ),
        ),
        torch=(
            Edit(
                TORCH_PARALLEL,
                "norm = torch.tensor(self.store.norm(), dtype=torch.float64)",
                "norm = global_norm(gradients)",
            ),
        ),
        setup="tensor",
        fp64_only=("torch",),
        note=f"each rank's shards have a factor of their own, so no one clip explains what the moments show; {PLAIN_ONLY}",
    ),
    Fault(
        name="optimizer-shard-not-updated",
        imitates="the moments of one rank's shard stay as they were",
        source="deepspeedai/DeepSpeed#2058 (a fraction of the weights is trained)",
        where=Where("moment1", EMBEDDING),
        jax=(
            Edit(
                STEP,
                "        stored = constrained(jax.tree.map(jnp.add",
                STALE_SHARD + "        stored = constrained(jax.tree.map(jnp.add",
            ),
        ),
        torch=(
            Edit(
                TORCH_ZERO,
                "        # DeepSpeed takes the mean over",
                "        if mesh.replicas.index == 0:\n"
                "            optimizer.step = lambda *args, **more: None\n"
                "        # DeepSpeed takes the mean over",
            ),
        ),
        setup="zero1",
        note="in fp64 torch has no split optimizer",
    ),
)
