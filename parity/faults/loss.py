"""Faults of data, loss and gradient: wrong examples, wrong divisors, wrong sums."""

from __future__ import annotations

from parity.faults.fault import Fault, Where, in_every_backend
from parity.runs.edit import Edit

TARGETS = "int((__labels != __ignored).sum())"
DIVIDED, TORCH_DIVIDED = "_mean(__sum, __tokens)", "__loss / __batch.target_tokens"
PASSED = "__loss_sum, __tokens, __gradients, __seen, __by_probe = __passed"
# Each microbatch's gradients are divided by its own tokens.
EACH_AVERAGED = Edit(
    "jaxtrain.program:Program._gradients.add",
    PASSED,
    "__it\n__gradients, __by_probe = jax.tree.map(lambda g: _mean(g, __tokens), (__gradients, __by_probe))",
)
# The reported loss is right; a wrong divisor first changes the gradient of the logits.
LOGITS_GRADIENT = Where("activation_gradient", "logits")

FAULTS = (
    Fault(
        name="packed-positions-not-restarted",
        imitates="the collator counts positions over the whole packed example",
        source="LlamaFactory#7318, meta-pytorch/torchtune#875",
        cause="positions-restart",
        where=Where("batch", "positions"),
        edits=in_every_backend(
            Edit("trainspec.data:Dataset._fill", "np.arange(__to - __at)", "np.arange(__at, __to)")
        ),
        setup="packed",
    ),
    Fault(
        name="data-order",
        imitates="the data is shuffled with another seed",
        source="huggingface/accelerate#4071, #2016; google/grain#1178",
        cause="data-order",
        where=Where("batch", "input_ids"),
        edits=in_every_backend(
            Edit(
                "trainspec.data:Dataset._permutation",
                'name_key(__seed, "order", __epoch)',
                'name_key(__seed + 1, "order", __epoch)',
            )
        ),
    ),
    Fault(
        name="record-repeated",
        imitates="the last record of a batch is repeated as the first of the next",
        source="huggingface/accelerate#4071, meta-pytorch/torchtune#247",
        cause="data-cursor",
        where=Where("batch", "input_ids", step=2),
        edits=in_every_backend(
            Edit(
                "trainspec.data:Dataset.batch",
                "range(__step * __examples, (__step + 1) * __examples)",
                "range(__step * (__examples - 1), __step * (__examples - 1) + __examples)",
            )
        ),
    ),
    Fault(
        name="label-shift",
        imitates="labels are shifted by the collator and once more in the loss",
        source="huggingface/transformers#44642, #32944",
        cause="label-shift",
        where=Where("loss", "loss_sum"),
        edits={
            "jax": (
                Edit("jaxtrain.loss:token_loss", "__logits[:, :-1]", "jnp.roll(__logits, 1, axis=1)[:, :-1]"),
            ),
            "torch": (
                Edit(
                    "torchtrain.loss:targets_of",
                    "F.pad(__labels[:, 1:], (0, 1), value=__ignored)",
                    "F.pad(__labels[:, 2:], (0, 2), value=__ignored)",
                ),
            ),
        },
    ),
    Fault(
        name="ignored-in-the-sum",
        imitates="positions without a label count in the loss as if their label were token 0",
        source="huggingface/trl#4147, axolotl-ai-cloud/axolotl#2089",
        cause="loss-mask",
        where=Where("loss", "loss_sum"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.loss:target_loss",
                    "jnp.sum(jnp.where(__counted, __losses, 0.0))",
                    "jnp.sum(__losses)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.loss:target_loss", "__targets.flatten()", "__targets.clamp(min=0).flatten()"
                ),
            ),
        },
    ),
    Fault(
        name="ignored-in-the-count",
        imitates="the sum is divided by the padded length",
        source="NovaSky-AI/SkyRL#467, huggingface/transformers#46204",
        cause="token-count",
        where=Where("tokens", "tokens"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.loss:target_loss",
                    "return __loss_sum, jnp.sum(__counted)",
                    "return __loss_sum, jnp.asarray(__counted.size)",
                ),
            ),
            "torch": (Edit("trainspec.data:Batch.target_tokens", TARGETS, "__labels.size"),),
        },
    ),
    Fault(
        name="mean-of-means",
        imitates="each microbatch is averaged over its own tokens, then the microbatches are averaged",
        source="huggingface/transformers#24725, #34191; karpathy/nanochat#59",
        cause="mean-of-means",
        where=LOGITS_GRADIENT,
        edits={
            "jax": (
                Edit("jaxtrain.program:Program._gradients", DIVIDED, "_mean(__sum, len(stacked['labels']))"),
                EACH_AVERAGED,
            ),
            "torch": (
                Edit(
                    "torchtrain.step:_Microbatches.loss",
                    TORCH_DIVIDED,
                    "__loss / microbatch.target_tokens / len(self)",
                ),
            ),
        },
    ),
    Fault(
        name="divided-by-batch",
        imitates="the sum is divided by the number of examples, not of tokens",
        source="huggingface/transformers#35203, ml-explore/mlx-lm#1413",
        cause="loss-divisor",
        where=LOGITS_GRADIENT,
        edits={
            "jax": (
                Edit("jaxtrain.program:Program._gradients", DIVIDED, "_mean(__sum, stacked['rows'].size)"),
            ),
            "torch": (
                Edit("torchtrain.step:_Microbatches.loss", TORCH_DIVIDED, "__loss / len(__batch.rows)"),
            ),
        },
    ),
    Fault(
        name="divided-by-accumulation",
        imitates="the sum is divided by the token count and by the number of microbatches as well",
        source="unslothai/unsloth-zoo#1023",
        cause="loss-divisor",
        where=LOGITS_GRADIENT,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._gradients",
                    DIVIDED,
                    "_mean(__sum, __tokens * len(stacked['rows']))",
                ),
            ),
            "torch": (Edit("torchtrain.step:_Microbatches.loss", TORCH_DIVIDED, "__it / len(self)"),),
        },
    ),
    Fault(
        name="last-microbatch-dropped",
        imitates="the update is made before the last microbatch's backward pass",
        source="huggingface/transformers#29561, tracel-ai/burn#5695",
        cause="microbatch-share",
        where=LOGITS_GRADIENT,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._gradients.add",
                    PASSED,
                    "__it\n"
                    "late = batch['rows'][-1] == stacked['rows'][-1, -1]\n"
                    "__gradients, __by_probe = jax.tree.map(lambda g: jnp.where(late, 0, g), (__gradients, __by_probe))",
                ),
            ),
            "torch": (
                Edit("torchtrain.step:_Microbatches.loss", TORCH_DIVIDED, "__it * (index + 1 < len(self))"),
            ),
        },
    ),
    Fault(
        name="tied-gradient-lost",
        imitates="a tied embedding gets the gradient of one of its two uses",
        source="NVIDIA/Megatron-LM#1548, #844; paiml/entrenar#314",
        cause="tied-gradient",
        where=Where("gradient", r"model\.embed_tokens\.weight"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.layers:Embedding.attend",
                    "matmul_transposed(__x, __weight)",
                    "__x @ lax.stop_gradient(__weight.value).T",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.model:build_model",
                    "return __model",
                    "__model.lm_head.forward = lambda x: x @ __model.lm_head.weight.detach().T\nreturn __model",
                ),
            ),
        },
        setup="tied",
    ),
)
