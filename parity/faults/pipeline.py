"""Faults of pipelines: layers on the wrong stage, microbatches that come twice, late or never, sums over stages missing.

JAX's stages are a dimension of arrays, so one edit is made for all of them; torch's are processes, each with DeepSpeed's
schedule of its own.
"""

from __future__ import annotations

from parity.faults.fault import Fault, Where
from parity.plant import Edit

STEP, PASSES, PIPELINE = "jaxtrain.step", "jaxtrain.passes", "jaxtrain.pipeline"
TORCH_STEP, TORCH_PIPELINE = "torchtrain.step", "torchtrain.pipeline"
LOGITS_GRADIENT = Where("activation_gradient", "logits")
ON_STAGES = "own = jax.tree.map(self._by_stage,"
STACK = "return stack.reshape(*cut, *stack.shape[1:])"
LEAVE = "return loss_sum, (tokens, tap.seen)"
NORM = "global_norm(gradients), gradients"
BACK = "by_layers, dx_SBTE, by_probe, by_prefix = pull(dy_SBTE)"
ENDS = "by_ends = jax.tree.map(jnp.add, by_head, by_embedding)"
BLOCKS = "(_Block(layer, at_hand) for layer in inner.layers)"
TORCH_BACKWARD = "self._microbatches.backward(self._backwards)"
TORCH_INPUT = 'engine.pipe_buffers["inputs"][buffer_id] = inputs["input_ids"]'
TORCH_DIVIDE = "part_loss / batch.target_tokens"
NO_FLOAT64 = "DeepSpeed has no float64, so torch has a pipeline in fp32 only"
# Layer 1 computes with the weights of layer 0. Its own take part with a factor of 0, so that they have gradients.
SECOND_IS_FIRST = """class _Again(_Block):
    def __init__(self, layer: nn.Module, at_hand: dict[str, Any], first: nn.Module) -> None:
        super().__init__(layer, at_hand)
        self._first = [first]

    def forward(self, hidden_BSE: Tensor) -> Tensor:
        weights = dict(self._first[0].named_parameters())
        found = torch.func.functional_call(self.layer, weights, (hidden_BSE,), self._at_hand)
        return found + 0 * sum(p.sum() for p in self.layer.parameters())


class _Tied(nn.Module):"""


def _gradient_times(factor: str) -> tuple[Edit, ...]:
    """In JAX each microbatch's loss as it is, its gradient times `factor`."""
    slope = f"more = loss_sum * ({factor} - 1)\n        loss_sum = loss_sum + (more - jax.lax.stop_gradient(more))"
    return (Edit(PIPELINE, LEAVE, f"{slope}\n        {LEAVE}"),)


FAULTS = (
    Fault(
        name="stage-order-swapped",
        imitates="each of two stages has the other one's layers",
        source="NVIDIA/Megatron-LM#1584, alpa-projects/alpa#752",
        where=Where("activation", r"layers\.0\.attention"),
        jax=(
            Edit(
                PIPELINE,
                ON_STAGES,
                "own = jax.tree.map(lambda stack: jnp.roll(self._by_stage(stack), 1, axis=0),",
            ),
        ),
        torch=(
            Edit(
                "trainspec.pipeline",
                "tuple(i % plan.pipe for i, piece",
                "tuple((-1 - i) % plan.pipe for i, piece",
            ),
            Edit(TORCH_PIPELINE, BLOCKS, BLOCKS.replace("inner.layers", "reversed(inner.layers)")),
        ),
        setup="pipe",
        note=NO_FLOAT64,
    ),
    Fault(
        name="layer-assigned-twice",
        imitates="a stage's first layer is its second one, too, and the second one is lost",
        source="huggingface/transformers#24381, ml-explore/mlx-lm#1688",
        where=Where("activation", r"layers\.1\.attention"),
        jax=(Edit(PIPELINE, STACK, f"stack = jnp.asarray(stack).at[1].set(stack[0])\n        {STACK}"),),
        torch=(
            Edit(
                TORCH_PIPELINE,
                BLOCKS,
                "(_Again(layer, at_hand, inner.layers[0]) if i == 1 else _Block(layer, at_hand)\n"
                "                for i, layer in enumerate(inner.layers))",
            ),
            Edit(TORCH_PIPELINE, "class _Tied(nn.Module):", SECOND_IS_FIRST),
        ),
        setup="pipe-deep",
        note=NO_FLOAT64,
    ),
    Fault(
        name="stage-input-reused",
        imitates="the first stage is fed the microbatch before once more",
        source="ooples/AiDotNet#845 (every microbatch is given the same input)",
        where=Where("activation", "embedding"),
        jax=(
            Edit(
                PASSES,
                "fresh_BTE = stages.enter({}, inputs, microbatch[0], Tap({}))",
                "fresh_BTE = stages.enter({}, inputs, jnp.maximum(microbatch[0] - 1, 0), Tap({}))",
            ),
        ),
        torch=(
            Edit(
                TORCH_PIPELINE,
                TORCH_INPUT,
                TORCH_INPUT.replace('inputs["input_ids"]', 'getattr(self, "_ids", inputs["input_ids"])')
                + '\n            self._ids = inputs["input_ids"]',
            ),
        ),
        setup="pipe",
        note=NO_FLOAT64,
    ),
    Fault(
        name="microbatch-counted-twice",
        imitates="the gradient of the pipeline's first microbatch is added twice",
        source="PipeDream-Flush, arXiv 2006.09503 (each microbatch has one backward pass in a batch)",
        where=LOGITS_GRADIENT,
        jax=_gradient_times("jnp.where(microbatch == 0, 2, 1)"),
        torch=(Edit(TORCH_STEP, TORCH_DIVIDE, f"{TORCH_DIVIDE} * (1 + (index == 0))"),),
        setup="pipe",
        note=NO_FLOAT64,
    ),
    Fault(
        name="pipeline-not-drained",
        imitates="the update comes when the last microbatch's gradient has not come back to the first stage",
        source="PipeDream-Flush, arXiv 2006.09503; NVIDIA-NeMo/Automodel#3530 (microbatches' gradients are lost)",
        where=Where("activation_gradient", r"layers\.0\.block"),
        jax=(
            Edit(
                PASSES,
                BACK,
                f"dy_SBTE = dy_SBTE * (number < num_ticks(plan, M, backward=True) - 1)\n        {BACK}",
            ),
        ),
        torch=(
            Edit(
                TORCH_PIPELINE,
                TORCH_BACKWARD,
                f"{TORCH_BACKWARD}\n"
                "        if engine.is_first_stage() and self._backwards == len(self._microbatches) - 1:\n"
                "            engine.grad_layer.zero_()",
            ),
        ),
        setup="pipe",
        note=NO_FLOAT64,
    ),
    Fault(
        name="microbatch-means-averaged",
        imitates="the last stage takes the mean over each microbatch's own tokens, then the mean of these",
        source="pytorch/torchtitan#2206, NVIDIA/Megatron-LM#936",
        where=LOGITS_GRADIENT,
        jax=_gradient_times(
            "jnp.sum(batch['labels'][..., 1:] != IGNORED) / len(batch['labels']) / jnp.maximum(tokens, 1)"
        ),
        torch=(Edit(TORCH_STEP, TORCH_DIVIDE, "part_loss / part.target_tokens / len(self)"),),
        setup="pipe",
        note=NO_FLOAT64,
    ),
    Fault(
        name="tied-gradients-not-summed-over-stages",
        imitates="the first and the last stage each keep the gradient of their own use of a tied embedding",
        source="uw-syfi/piper#13",
        where=Where("gradient", r"model\.embed_tokens\.weight"),
        jax=(
            Edit(
                PASSES,
                ENDS,
                f"{ENDS} | {{n: by_embedding[n] for n in by_head if n.startswith('embed_tokens')}}",
            ),
        ),
        torch=(Edit(TORCH_PIPELINE, "if not (model.config.tie_word_embeddings and", "if True or (True and"),),
        setup="pipe-tied",
        note=NO_FLOAT64,
    ),
    Fault(
        name="prefix-gradients-not-summed-over-stages",
        imitates="each stage makes the prefix of all layers and keeps the gradient of its own layers' part",
        source="uw-syfi/piper#13 (likewise of a tied embedding)",
        where=Where("gradient", r"prompt_encoder\.transform\.2\.weight"),
        jax=(
            Edit(
                PASSES,
                "pull(kept.by_virtual)",
                "pull(jax.tree.map(lambda g: g.at[len(g) // plan.pipe :].set(0), kept.by_virtual))",
            ),
        ),
        torch=(Edit(TORCH_PIPELINE, "self._stages.sum_(gradient)", "del gradient"),),
        setup="pipe-prefix",
        note=NO_FLOAT64,
    ),
    Fault(
        name="later-stages-left-out-of-clip-norm",
        imitates="the norm that gradients are clipped by is that of the first stage's",
        source="pytorch/torchtitan#596, Modalities/modalities#313",
        where=Where("grad_norm", "grad_norm"),
        jax=(
            Edit(
                STEP,
                NORM,
                NORM.replace(
                    "(gradients)",
                    "({n: g[: len(g) // self.recipe.plan.pipe] if is_stacked(n) else g\n"
                    "             for n, g in gradients.items() if is_stacked(n) or n.startswith('embed')})",
                ),
            ),
        ),
        torch=(
            Edit(
                TORCH_PIPELINE,
                "self._engine._compute_loss = True",
                "self._engine._compute_loss, self._engine.optimizer.model_parallel_group = True, None",
            ),
        ),
        setup="pipe",
        note=NO_FLOAT64,
    ),
)
