"""Faults of the optimizer's rule: an epsilon, a rate, a schedule, decay, betas, a type, the clip."""

from __future__ import annotations

from parity.faults.fault import Fault, Where, in_every_backend
from parity.faults.update import CLIP, EMBEDDING, FIRST_MOMENT, FIRST_UPDATE, RATES, TORCH_RATE
from parity.faults.written_out import ADAMW, ADAMW_WRITTEN_OUT
from parity.runs.edit import Edit

JAX_ROOT = ("jaxtrain.optim:make_optimizer", "jnp.sqrt(__v) / jnp.sqrt(__correction) + __eps")
TORCH_OPTIMIZER = (
    "torchtrain.optim:make_optimizer",
    "torch.optim.AdamW(__groups, lr=__lr, betas=__betas, eps=__eps, fused=True)",
)
SCHEDULE = (
    "trainspec.training.loop:follow",
    "learning_rate(__schedule, peak=__peak, step=__step, steps=__steps)",
)
DELTA = ("jaxtrain.optim:make_optimizer.update", "__step - __decay if __decays else __step")
SECOND_RATE = Where("lr", "lr", step=2)

FAULTS = (
    Fault(
        name="adam-epsilon-of-another-library",
        imitates="epsilon is 1e-6, the default of transformers' own AdamW, not the recipe's 1e-8",
        source="uds-lsv/bert-stable-fine-tuning#5; transformers 4's AdamW against torch.optim.AdamW",
        cause="adam-epsilon",
        where=FIRST_UPDATE,
        edits={
            "jax": (Edit(*JAX_ROOT, "jnp.sqrt(__v) / jnp.sqrt(__correction) + 1e-6"),),
            "torch": (
                Edit(
                    *TORCH_OPTIMIZER,
                    "torch.optim.AdamW(__groups, lr=__lr, betas=__betas, eps=1e-6, fused=True)",
                ),
            ),
        },
    ),
    Fault(
        name="adam-epsilon-before-correction",
        imitates="epsilon is added to the root before the bias correction (epsilon hat)",
        source="tensorflow/tensorflow#9047; Adam, arXiv 1412.6980, end of section 2",
        cause="adam-epsilon",
        where=FIRST_UPDATE,
        edits={
            "jax": (Edit(*JAX_ROOT, "(jnp.sqrt(__v) + __eps) / jnp.sqrt(__correction)"),),
            "torch": (
                *ADAMW_WRITTEN_OUT,
                Edit(ADAMW, "__v.sqrt() + __eps", "__v.sqrt() + __eps / (1 - b2**t) ** 0.5"),
            ),
        },
    ),
    Fault(
        name="beta2-of-another-recipe",
        imitates="beta2 is 0.95, a usual one for language models, not the recipe's 0.999",
        source="GPT-3, arXiv 2005.14165, appendix B (0.95) against torch.optim.AdamW's default (0.999)",
        cause="betas",
        where=Where("moment2", EMBEDDING),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.optim:make_optimizer",
                    "__beta1, __beta2 = __spec.betas",
                    "__beta1, __beta2 = __spec.betas[0], 0.95",
                ),
                Edit("jaxtrain.optim:rates", RATES, "Rates(__lr, __correction1, 1 - 0.95 ** (step + 1))"),
            ),
            "torch": (
                Edit(
                    *TORCH_OPTIMIZER,
                    "torch.optim.AdamW(__groups, lr=__lr, betas=(__betas[0], 0.95), eps=__eps, fused=True)",
                ),
            ),
        },
    ),
    Fault(
        name="nesterov-momentum",
        imitates="the update looks ahead: it takes beta1 m + (1 - beta1) g for m (NAdam without its schedule)",
        source="optax.nadamw against optax.adamw; NAdam (Dozat, ICLR workshop 2016)",
        cause="momentum",
        where=FIRST_UPDATE,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.optim:make_optimizer.update",
                    "__moments[name] / __root",
                    "(beta1 * __moments[name] + (1 - beta1) * gradients[name]) / __root",
                ),
            ),
            "torch": (
                *ADAMW_WRITTEN_OUT,
                Edit(
                    ADAMW,
                    's["exp_avg"] / __correction',
                    '(b1 * s["exp_avg"] + (1 - b1) * p.grad) / __correction',
                ),
            ),
        },
    ),
    Fault(
        name="moments-in-bf16",
        imitates="both moments are kept in bfloat16",
        source="TensorAuto/OpenTau#181",
        cause="rounded-state",
        where=FIRST_MOMENT,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._update",
                    "__deltas, __next = self.optimizer.update(__gradients, __moments, __weights, rates=__rates)",
                    "__it\n__next = jax.tree.map(lambda m: lax.reduce_precision(m, 8, 7), __next)",
                ),
            ),
            "torch": (
                *ADAMW_WRITTEN_OUT,
                Edit(
                    ADAMW,
                    "p.sub_(__step)",
                    '(__it, s["exp_avg"].copy_(s["exp_avg"].bfloat16()), s["exp_avg_sq"].copy_(s["exp_avg_sq"].bfloat16()))',
                ),
            ),
        },
    ),
    Fault(
        name="clip-at-the-default",
        imitates="gradients are clipped at 1.0, the default, not at the recipe's norm",
        source="NVIDIA-NeMo/Automodel#904 (1.0 where nothing is said), ultralytics/ultralytics#24320 (hard-coded)",
        cause="clip-size",
        where=CLIP,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._update",
                    "clip(__g, __n, max_norm=__max)",
                    "clip(__g, __n, max_norm=1.0)",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.engines.plain:PlainEngine.step",
                    "clip(__g, __n, max_norm=__max)",
                    "clip(__g, __n, max_norm=1.0)",
                ),
                Edit(
                    "torchtrain.engines.deepspeed:deepspeed_config",
                    "__recipe.optimizer.clip_norm or 0.0",
                    "1.0",
                ),
            ),
        },
    ),
    Fault(
        name="rate-of-the-step-before",
        imitates="an update is made with the rate of the one before: the scheduler steps after the optimizer reads it",
        source="pytorch/pytorch#20124 (order of scheduler.step), deepspeedai/DeepSpeed#5287",
        cause="rate-applied",
        where=Where("update", EMBEDDING, step=2),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.step:train_step",
                    "__scalars = rates(__optimizer, lr=lr, step=__step)",
                    "__scalars = rates(__optimizer, lr=getattr(program, 'late', lr), step=__step)\nprogram.late = lr",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.optim:set_learning_rate",
                    TORCH_RATE,
                    '__group["lr"], __group["next"] = __group.get("next", __lr), __lr',
                ),
            ),
        },
    ),
    Fault(
        name="schedule-by-microbatch",
        imitates="the scheduler steps once for each microbatch",
        source="starVLA/starVLA#210, Lightning-AI/pytorch-lightning#1476",
        cause="schedule-offset",
        where=SECOND_RATE,
        edits=in_every_backend(
            Edit(
                *SCHEDULE,
                "learning_rate(__schedule, peak=__peak, step=__step * recipe.batch.accumulation, steps=__steps)",
            )
        ),
    ),
    Fault(
        name="schedule-of-twice-the-length",
        imitates="the schedule's length counts microbatches, so the rate falls too slowly",
        source="huggingface/diffusers#2632, IndicoDataSolutions/finetune#380",
        cause="schedule",
        where=SECOND_RATE,
        edits=in_every_backend(
            Edit(
                *SCHEDULE,
                "learning_rate(__schedule, peak=__peak, step=__step, steps=__steps * recipe.batch.accumulation)",
            )
        ),
    ),
    Fault(
        name="rate-of-b-alone",
        imitates="the rate of an adapter's B is 16 times that of A",
        source="LoRA+, arXiv 2402.12354 (create_loraplus_optimizer of huggingface/peft)",
        cause="rate-applied",
        where=Where("update", r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_B\.weight"),
        edits={
            "jax": (Edit(*DELTA, '(__it) * (16 if name.endswith("lora_b") else 1)'),),
            "torch": (
                Edit(
                    "torchtrain.optim:make_optimizer",
                    "return torch.optim.AdamW(__groups, lr=__lr, betas=__betas, eps=__eps, fused=True)",
                    "fast = {id(p) for name, p in parameters.items() if '.lora_B.' in name}\n"
                    "split = [\n"
                    "    {**g, 'params': [p for p in g['params'] if (id(p) in fast) == yes], 'times': 16 if yes else 1}\n"
                    "    for g in __groups for yes in (True, False)\n"
                    "]\n"
                    "split = [g for g in split if g['params']]\n"
                    "return torch.optim.AdamW(split, lr=__lr, betas=__betas, eps=__eps, fused=True)",
                ),
                Edit(
                    "torchtrain.optim:set_learning_rate",
                    TORCH_RATE,
                    '__group["lr"] = __lr * __group.get("times", 1)',
                ),
            ),
        },
        setup="adapter",
    ),
    Fault(
        name="decay-missing",
        imitates="no weight decays: the optimizer's group has its own decay of zero",
        source="huggingface/transformers#35927 (which parameters decay)",
        cause="decay-size",
        where=FIRST_UPDATE,
        edits={
            "jax": (Edit(*DELTA, "__step"),),
            "torch": (
                Edit(
                    "torchtrain.optim:make_optimizer",
                    "((True, __decay), (False, 0.0))",
                    "((True, 0.0), (False, 0.0))",
                ),
            ),
        },
    ),
    Fault(
        name="embedding-not-decayed",
        imitates="the embedding does not decay, though other matrices do",
        source="configure_optimizers of karpathy/minGPT: embeddings do not decay",
        cause="decay-mask",
        where=FIRST_UPDATE,
        edits=in_every_backend(Edit("trainspec.families.llama:matrix", "True", 'role != "embedding"')),
    ),
)
