"""Faults of data, loss and gradient: what is trained on, what the sum is divided by, what is added up."""

from __future__ import annotations

from parity.faults.fault import Fault, Where
from parity.faults.written_out import torch_model
from parity.plant import Edit

STEP, LOSS = "jaxtrain.step", "jaxtrain.loss"
TORCH_STEP, TORCH_LOSS = "torchtrain.step", "torchtrain.loss"
DATA = "trainspec.data"
ADD = "sums = jax.tree.map(jnp.add, totals[2], gradients)"
DIVIDE = "lambda g: _mean(g, tokens), (sums, by_probe)"
TORCH_DIVIDE = "part_loss / batch.target_tokens"
# The loss as reported is right; the first thing that a wrong divisor changes is the gradient of the logits.
LOGITS_GRADIENT = Where("activation_gradient", "logits")
SHUFFLED = Edit(
    DATA, 'name_key(self._seed, "order", str(epoch))', 'name_key(self._seed + 1, "order", str(epoch))'
)
REPEATED = Edit(
    DATA,
    "positions = range(step * examples, (step + 1) * examples)",
    "positions = range(step * (examples - 1), step * (examples - 1) + examples)",
)
NOT_RESTARTED = Edit(
    DATA, "positions[i, at:to] = np.arange(to - at)", "positions[i, at:to] = np.arange(at, to)"
)

FAULTS = (
    Fault(
        name="packed-positions-not-restarted",
        imitates="the collator counts positions over the whole packed row",
        source="LlamaFactory#7318, meta-pytorch/torchtune#875",
        where=Where("batch", "positions"),
        jax=(NOT_RESTARTED,),
        torch=(NOT_RESTARTED,),
        setup="packed",
    ),
    Fault(
        name="data-order",
        imitates="the data is shuffled with another seed",
        source="huggingface/accelerate#4071, #2016; google/grain#1178",
        where=Where("batch", "input_ids"),
        jax=(SHUFFLED,),
        torch=(SHUFFLED,),
    ),
    Fault(
        name="record-repeated",
        imitates="the last record of a batch is the first of the next again",
        source="huggingface/accelerate#4071, meta-pytorch/torchtune#247",
        where=Where("batch", "input_ids", step=2),
        jax=(REPEATED,),
        torch=(REPEATED,),
    ),
    Fault(
        name="label-shift",
        imitates="labels are shifted by the collator and once more in the loss",
        source="huggingface/transformers#44642, #32944",
        where=Where("loss", "loss_sum"),
        jax=(
            Edit(
                LOSS,
                "wide = logits[:, :-1].astype",
                "wide = jnp.roll(logits, 1, axis=1)[:, :-1].astype",
            ),
        ),
        torch=(
            Edit(
                TORCH_LOSS,
                "F.pad(labels[:, 1:], (0, 1), value=IGNORED)",
                "F.pad(labels[:, 2:], (0, 2), value=IGNORED)",
            ),
        ),
    ),
    Fault(
        name="ignored-in-the-sum",
        imitates="positions without a label add to the loss as if they asked for token 0",
        source="huggingface/trl#4147, axolotl-ai-cloud/axolotl#2089",
        where=Where("loss", "loss_sum"),
        jax=(Edit(LOSS, "jnp.where(counted, losses, 0.0)", "losses"),),
        torch=(Edit(TORCH_LOSS, "targets_BS.flatten()", "targets_BS.clamp(min=0).flatten()"),),
    ),
    Fault(
        name="ignored-in-the-count",
        imitates="the sum is divided by the padded length",
        source="NovaSky-AI/SkyRL#467, huggingface/transformers#46204",
        where=Where("tokens", "tokens"),
        jax=(Edit(LOSS, ", jnp.sum(counted)", ", jnp.asarray(counted.size)"),),
        torch=(Edit(DATA, "int((self.labels != IGNORED).sum())", "self.labels.size"),),
    ),
    Fault(
        name="mean-of-means",
        imitates="each microbatch is averaged over its own tokens, then the microbatches are averaged",
        source="huggingface/transformers#24725, #34191; karpathy/nanochat#59",
        where=LOGITS_GRADIENT,
        jax=(
            Edit(
                STEP,
                ADD,
                f"gradients, by_probe = jax.tree.map(lambda g: _mean(g, tokens), (gradients, by_probe))\n            {ADD}",
            ),
            Edit(STEP, DIVIDE, "lambda g: _mean(g, len(stacked['labels'])), (sums, by_probe)"),
        ),
        torch=(Edit(TORCH_STEP, TORCH_DIVIDE, "part_loss / part.target_tokens / len(self)"),),
    ),
    Fault(
        name="divided-by-batch",
        imitates="the sum is divided by the number of examples, not of tokens",
        source="huggingface/transformers#35203, ml-explore/mlx-lm#1413",
        where=LOGITS_GRADIENT,
        jax=(Edit(STEP, DIVIDE, "lambda g: _mean(g, stacked['rows'].size), (sums, by_probe)"),),
        torch=(Edit(TORCH_STEP, TORCH_DIVIDE, "part_loss / len(batch.rows)"),),
    ),
    Fault(
        name="divided-by-accumulation",
        imitates="the sum is divided by the token count and by the number of microbatches as well",
        source="unslothai/unsloth-zoo#1023",
        where=LOGITS_GRADIENT,
        jax=(Edit(STEP, DIVIDE, "lambda g: _mean(g, tokens * len(stacked['rows'])), (sums, by_probe)"),),
        torch=(Edit(TORCH_STEP, TORCH_DIVIDE, "part_loss / batch.target_tokens / len(self)"),),
    ),
    Fault(
        name="last-microbatch-dropped",
        imitates="the update is made before the last microbatch's backward pass",
        source="huggingface/transformers#29561, tracel-ai/burn#5695",
        where=LOGITS_GRADIENT,
        jax=(
            Edit(
                STEP,
                ADD,
                "late = batch['rows'][-1] == stacked['rows'][-1, -1]\n            "
                "gradients, by_probe = jax.tree.map(lambda g: jnp.where(late, 0, g), (gradients, by_probe))\n"
                f"            {ADD}",
            ),
        ),
        torch=(Edit(TORCH_STEP, TORCH_DIVIDE, f"{TORCH_DIVIDE} * (index + 1 < len(self))"),),
    ),
    Fault(
        name="tied-gradient-lost",
        imitates="a tied embedding gets the gradient of one of its two uses",
        source="NVIDIA/Megatron-LM#1548, #844; paiml/entrenar#314",
        where=Where("gradient", r"model\.embed_tokens\.weight"),
        jax=(
            Edit(
                "jaxtrain.model",
                "matmul_transposed(x_BSE, self.embedding.get_value())",
                "x_BSE @ lax.stop_gradient(self.embedding.get_value().value).T",
            ),
        ),
        torch=torch_model(
            "    model.lm_head.forward = lambda x: x @ model.lm_head.weight.detach().T\n",
        ),
        setup="tied",
    ),
)
