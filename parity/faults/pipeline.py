"""Faults of pipelines: layers on the wrong stage, microbatches that come twice, late or never, sums over stages missing.

JAX's stages are a dimension of arrays, so an edit applies to all of them; torch's are processes, each with its own
DeepSpeed schedule.
"""

from __future__ import annotations

from parity.faults.fault import Fault, Where, at_point
from parity.faults.loss import LOGITS_GRADIENT, TORCH_DIVIDED
from parity.runs.edit import Edit

NO_FLOAT64 = "DeepSpeed has no float64, so torch has a pipeline in fp32 only"


def _gradient_times(factor: str) -> Edit:
    """In JAX: each microbatch's loss unchanged, its gradient times `factor`."""
    return Edit(
        "jaxtrain.pipeline:Stages.loss",
        "return __loss, (__tokens, __seen)",
        f"more = __loss * ({factor} - 1)\n__loss = __loss + (more - jax.lax.stop_gradient(more))\n__it",
    )


FAULTS = (
    Fault(
        name="stage-order-swapped",
        imitates="the two stages have each other's layers",
        source="NVIDIA/Megatron-LM#1584, alpa-projects/alpa#752",
        cause="layer-order",
        where=at_point("input_norm"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.pipeline:Stages.run",
                    "jax.tree.map(self._by_stage, __stacks)",
                    "jax.tree.map(lambda stack: jnp.roll(self._by_stage(stack), 1, axis=0), __stacks)",
                ),
            ),
            "torch": (
                Edit(
                    "trainspec.plans.pipeline:layer_stages",
                    "__piece % __plan.pipe",
                    "(-1 - __piece) % __plan.pipe",
                ),
                Edit(
                    "torchtrain.engines.pipeline:_layers",
                    "__anatomy.layers(__model)",
                    "reversed(__anatomy.layers(__model))",
                ),
            ),
        },
        setup="pipe",
        note=NO_FLOAT64,
    ),
    Fault(
        name="layer-assigned-twice",
        imitates="a stage uses its first layer twice and its second one not at all",
        source="huggingface/transformers#24381, ml-explore/mlx-lm#1688",
        cause="layer-order",
        where=at_point("input_norm", layer=1),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.pipeline:Stages._by_stage",
                    "__stack.reshape(*__cut, *__sizes)",
                    "jnp.asarray(__stack).at[1].set(__stack[0]).reshape(*__cut, *__sizes)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.engines.pipeline:_layers",
                    "__middle = [*__blocks, __norm]",
                    "from parity.faults.substitutes.torch_layers import second_is_first\n"
                    "__middle = [*second_is_first(__blocks), __norm]",
                ),
            ),
        },
        setup="pipe-deep",
        note=NO_FLOAT64,
    ),
    Fault(
        name="stage-input-reused",
        imitates="the first stage is fed the previous microbatch again",
        source="ooples/AiDotNet#845 (every microbatch is given the same input)",
        cause="microbatch-input",
        where=Where("activation", "embedding"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.passes:OneFOneB._pass_forward",
                    "__microbatch[0]",
                    "jnp.maximum(__microbatch[0] - 1, 0)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.engines.pipeline:PipelineEngine._forward_pass",
                    '__pipeline.set_input(__buffer, __inputs["input_ids"])',
                    '__pipeline.set_input(__buffer, getattr(self, "_ids", __inputs["input_ids"]))\n'
                    'self._ids = __inputs["input_ids"]',
                ),
            ),
        },
        setup="pipe",
        note=NO_FLOAT64,
    ),
    Fault(
        name="microbatch-counted-twice",
        imitates="the gradient of the pipeline's first microbatch is added twice",
        source="PipeDream-Flush, arXiv 2006.09503 (each microbatch has one backward pass in a batch)",
        cause="microbatch-share",
        where=LOGITS_GRADIENT,
        edits={
            "jax": (_gradient_times("jnp.where(microbatch == 0, 2, 1)"),),
            "torch": (
                Edit("torchtrain.step:_Microbatches.loss", TORCH_DIVIDED, "__it * (1 + (index == 0))"),
            ),
        },
        setup="pipe",
        note=NO_FLOAT64,
    ),
    Fault(
        name="pipeline-not-drained",
        imitates="the update is made before the last microbatch's gradient is back at the first stage",
        source="PipeDream-Flush, arXiv 2006.09503; NVIDIA-NeMo/Automodel#3530 (microbatches' gradients are lost)",
        cause="microbatch-share",
        where=Where("activation_gradient", r"layers\.0\.block"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.passes:OneFOneB._pass_backward",
                    "__layers, __dx, __by_probe, __prefix = __pull(__dy)",
                    "__layers, __dx, __by_probe, __prefix = __pull(__dy * (tick < num_ticks(plan, M, backward=True) - 1))",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.engines.pipeline:PipelineEngine._backward_pass",
                    "__microbatches.backward(__index)",
                    "__it\n"
                    "if self._pipeline.is_first_stage and __index == len(__microbatches) - 1:\n"
                    "    self._engine.grad_layer.zero_()",
                ),
            ),
        },
        setup="pipe",
        note=NO_FLOAT64,
    ),
    Fault(
        name="microbatch-means-averaged",
        imitates="the last stage averages each microbatch over its own tokens, then averages the microbatches",
        source="pytorch/torchtitan#2206, NVIDIA/Megatron-LM#936",
        cause="mean-of-means",
        where=LOGITS_GRADIENT,
        edits={
            "jax": (
                _gradient_times(
                    "jnp.sum(batch['labels'][..., 1:] != IGNORED) / len(batch['labels']) / jnp.maximum(__tokens, 1)"
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.step:_Microbatches.loss",
                    TORCH_DIVIDED,
                    "__loss / microbatch.target_tokens / len(self)",
                ),
            ),
        },
        setup="pipe",
        note=NO_FLOAT64,
    ),
    Fault(
        name="tied-gradients-not-summed-over-stages",
        imitates="the first and the last stage each keep the gradient of their own use of a tied embedding",
        source="uw-syfi/piper#13",
        cause="tied-gradient",
        where=Where("gradient", r"model\.embed_tokens\.weight"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.passes:OneFOneB._pass_backward",
                    "__by_embedding, __by_rows, __by_probes = __pull(__dx)\n__by_ends = jax.tree.map(jnp.add, __by_head, __by_embedding)",
                    "__it\n__by_ends |= {n: __by_embedding[n] for n in __by_head if n.startswith('embed_tokens')}",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.engines.pipeline:_layers",
                    "__config.tie_word_embeddings and __is_trained",
                    "False",
                ),
            ),
        },
        setup="pipe-tied",
        note=NO_FLOAT64,
    ),
    Fault(
        name="prefix-gradients-not-summed-over-stages",
        imitates="each stage makes the prefix of all layers and keeps only the gradient of its own layers",
        source="uw-syfi/piper#13 (likewise of a tied embedding)",
        cause="stage-gradient-sum",
        where=Where("gradient", r"prompt_encoder\.transform\.2\.weight"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.passes:OneFOneB.gradients",
                    "(__by_encoder,) = __pull(__by_virtual)",
                    "(__by_encoder,) = __pull(jax.tree.map(lambda g: g.at[len(g) // plan.pipe :].set(0), __by_virtual))",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.engines.pipeline:PipelineEngine._reduce_shared",
                    "__stages.sum_(__gradient)",
                    "None",
                ),
            ),
        },
        setup="pipe-prefix",
        note=NO_FLOAT64,
    ),
    Fault(
        name="later-stages-left-out-of-clip-norm",
        imitates="gradients are clipped by the norm of the first stage's gradients alone",
        source="pytorch/torchtitan#596, Modalities/modalities#313",
        cause="norm-of-part",
        where=Where("grad_norm", "grad_norm"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._gradients",
                    "global_norm(__gradients)",
                    "global_norm({n: g[: len(g) // self.recipe.plan.pipe] if is_stacked(n) else g\n"
                    "             for n, g in __gradients.items() if is_stacked(n) or n.startswith('embed')})",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain._deepspeed:Pipeline.__init__",
                    "__engine._compute_loss = __yes",
                    "__it\n__engine.optimizer.model_parallel_group = __engine.optimizer.mpu = None",
                ),
            ),
        },
        setup="pipe",
        note=NO_FLOAT64,
    ),
)
