"""Faults of batch and loss: examples in another order, other targets and counts, other terms, sums that are not right."""

from __future__ import annotations

from parity.faults.fault import Fault, Where, in_every_backend
from parity.faults.loss import DIVIDED, EACH_AVERAGED, LOGITS_GRADIENT, TARGETS, TORCH_DIVIDED
from parity.runs.edit import Edit

LOSS, TOKENS = Where("loss", "loss_sum"), Where("tokens", "tokens")
JAX_LOSS = ("jaxtrain.loss:target_loss", 'rounded(jax.nn.logsumexp(__wide, axis=-1), "wide") - __picked')
TORCH_LOSS = (
    "torchtrain.loss:cross_entropy_sum",
    'F.cross_entropy(__logits, __targets, ignore_index=__ignored, reduction="sum")',
)
PLAIN_ONLY = (
    "in fp32 DeepSpeed clears the gradients: the torch edit reaches the plain engine of fp64 runs only"
)
# The tiny tokenizer's end token.
END = 2

FAULTS = (
    Fault(
        name="sorted-by-length",
        imitates="the examples of a batch are sorted by length",
        source="LengthGroupedSampler (group_by_length) of huggingface/transformers",
        cause="data-order",
        where=Where("batch", "input_ids"),
        edits=in_every_backend(
            Edit(
                "trainspec.data:Dataset.batch",
                "self._fill(__numbers)",
                "self._fill(sorted(__numbers, key=lambda n: -sum(self._segments[j].length for j in self._example_segments[n])))",
            )
        ),
    ),
    Fault(
        name="prompt-trained-on-one-side",
        imitates="the prompt's tokens are targets as well",
        source="huggingface/trl#4147, #4201 (completion-only masks)",
        cause="labels",
        where=Where("batch", "labels"),
        edits=in_every_backend(Edit("trainspec.data:_targets", '__data.loss_on == "all"', "True")),
    ),
    Fault(
        name="one-segment-for-all",
        imitates="all documents packed into an example have one segment number",
        source="AI-Hypercomputer/maxtext#4476, LlamaFactory#7318",
        cause="segments",
        where=Where("batch", "segments"),
        edits=in_every_backend(
            Edit(
                "trainspec.data:Dataset._fill",
                "__segments[__i, __at:__to] = ordinal",
                "__segments[__i, __at:__to] = 1",
            )
        ),
        setup="packed",
    ),
    Fault(
        name="slice-repeated",
        imitates="every microbatch is given the first one's tokens, with its own labels",
        source="ooples/AiDotNet#845, huggingface/accelerate#2016",
        cause="microbatch-input",
        where=Where("activation", "embedding"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._gradients.add",
                    "self._passes.gradients(__weights, __slots, __batch, __step, record_activations=__records)",
                    "self._passes.gradients(\n"
                    "    __weights, __slots,\n"
                    "    __batch | {k: stacked[k][0] for k in ('input_ids', 'positions', 'segments')}, __step,\n"
                    "    record_activations=__records,\n"
                    ")",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.step:_Microbatches.forward",
                    "inputs_of(self._microbatches[__index], __run, is_recorded=__recorded)",
                    "inputs_of(self._microbatches[0], __run, is_recorded=__recorded)",
                ),
            ),
        },
    ),
    Fault(
        name="attended-tokens-counted",
        imitates="the sum is divided by the number of tokens that are no padding, not of targets",
        source="NovaSky-AI/SkyRL#467, huggingface/transformers#46204",
        cause="token-count",
        where=TOKENS,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._gradients.add",
                    "totals[1] + __tokens",
                    "totals[1] + jnp.sum(batch['segments'] != 0)",
                ),
            ),
            "torch": (
                Edit("trainspec.data:Batch.target_tokens", TARGETS, "int((self.segments != 0).sum())"),
            ),
        },
    ),
    Fault(
        name="end-token-not-counted",
        imitates="the end token is taken for padding: it is no target",
        source="NVIDIA-NeMo/Megatron-Bridge#4660, verl-project/verl#535",
        cause="token-count",
        where=TOKENS,
        edits={
            "jax": (
                Edit("jaxtrain.loss:target_loss", "__targets != __ignored", f"__it & (__targets != {END})"),
            ),
            "torch": (
                Edit(
                    "torchtrain.loss:targets_of",
                    "F.pad(__labels[:, 1:], (0, 1), value=__ignored)",
                    f"F.pad(__labels[:, 1:].masked_fill(__labels[:, 1:] == {END}, __ignored), (0, 1), value=__ignored)",
                ),
                Edit(
                    "trainspec.data:Batch.target_tokens",
                    TARGETS,
                    f"int(((__labels != __ignored) & (__labels != {END})).sum())",
                ),
            ),
        },
    ),
    Fault(
        name="label-smoothing",
        imitates="a tenth of each target is spread over the vocabulary",
        source="pytorch/pytorch#73205, OpenNMT/OpenNMT-py#1463; arXiv 1512.00567",
        cause="loss-form",
        where=LOSS,
        later_in={"bf16": Where("activation_gradient", "logits")},
        edits={
            "jax": (Edit(*JAX_LOSS, "__it + 0.1 * (__picked - jnp.mean(__wide, axis=-1))"),),
            "torch": (
                Edit(
                    *TORCH_LOSS,
                    'F.cross_entropy(__logits, __targets, ignore_index=__ignored, reduction="sum", label_smoothing=0.1)',
                ),
            ),
        },
    ),
    Fault(
        name="z-loss",
        imitates="the square of the log-sum-exp is added, times 0.0001",
        source="allenai/OLMo#760, erfanzar/EasyDeL#123; PaLM, arXiv 2204.02311",
        cause="loss-form",
        where=LOSS,
        below_bound_in=("bf16",),
        edits={
            "jax": (Edit(*JAX_LOSS, "__it + 1e-4 * jax.nn.logsumexp(__wide, axis=-1) ** 2"),),
            "torch": (
                Edit(
                    *TORCH_LOSS,
                    "__it + 1e-4 * ((__targets != __ignored) * __logits.logsumexp(-1) ** 2).sum()",
                ),
            ),
        },
    ),
    Fault(
        name="logits-capped-in-the-loss",
        imitates="the loss is taken of logits capped at 30, as Gemma 2's are",
        source="unslothai/unsloth#11277 (the fused loss and the logits differ); Gemma 2, arXiv 2408.00118",
        cause="loss-form",
        where=LOSS,
        below_bound_in=("bf16",),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.loss:target_loss",
                    "__logits.astype(__type)",
                    "30.0 * jnp.tanh(__it / 30.0)",
                ),
            ),
            "torch": (
                Edit("torchtrain.loss:target_loss", "__logits.to(__type)", "30.0 * torch.tanh(__it / 30.0)"),
            ),
        },
    ),
    Fault(
        name="means-summed",
        imitates="each microbatch is averaged over its own tokens, and the averages are summed",
        source="AI-Hypercomputer/maxtext#3040 (sum, not mean, under accumulation)",
        cause="mean-of-means",
        where=LOGITS_GRADIENT,
        edits={
            "jax": (
                Edit("jaxtrain.program:Program._gradients", DIVIDED, "__sum"),
                EACH_AVERAGED,
            ),
            "torch": (
                Edit(
                    "torchtrain.step:_Microbatches.loss", TORCH_DIVIDED, "__loss / microbatch.target_tokens"
                ),
            ),
        },
    ),
    Fault(
        name="gradient-kept",
        imitates="gradients are not cleared after an update: the next one's are added to them",
        source="tenstorrent/tt-blacksmith#711, meta-pytorch/torchforge#71, pytorch/pytorch#47175",
        cause="stale-gradient",
        where=Where("gradient", r"lm_head\.weight", step=2),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.step:train_step",
                    "__metrics = _metrics(program, __found, __keep)",
                    "from jaxtrain.optim import clip, global_norm\n"
                    "if hasattr(program, 'kept'):\n"
                    "    sums = jax.tree.map(jnp.add, __found.gradients, program.kept)\n"
                    "    __found = __found._replace(gradients=sums, norm=global_norm(sums))\n"
                    "program.kept = clip(__found.gradients, __found.norm, max_norm=program.recipe.optimizer.clip_norm)\n"
                    "__it",
                ),
            ),
            "torch": (
                Edit("torchtrain.engines.plain:PlainEngine.step", "self._optimizer.zero_grad()", "None"),
            ),
        },
        fp64_only=("torch",),
        note=PLAIN_ONLY,
    ),
)
