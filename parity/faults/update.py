"""Faults of the update: clipping, AdamW, the schedule, updates that do not happen."""

from __future__ import annotations

from parity.faults.fault import Fault, Where
from parity.faults.written_out import torch_adamw
from parity.plant import Edit

OPTIM, STEP = "jaxtrain.optim", "jaxtrain.step"
TORCH_OPTIM, TORCH_STEP, TORCH_ENGINE = "torchtrain.optim", "torchtrain.step", "torchtrain.parallel"
EMBEDDING = r"model\.embed_tokens\.weight"  # the first tensor in forward order, and one that decays
CLIP = Where("clip", "clip_factor")
FIRST_MOMENT, FIRST_UPDATE = Where("moment1", EMBEDDING), Where("update", EMBEDDING)
DECAYED_STEP = "step - rates.lr * spec.weight_decay * weights[name] if name in decayed else step"
FACTOR = "gradients = clip(gradients, norm,"
TORCH_STEPS = "        self._optimizer.step()\n        self._optimizer.zero_grad()"
RATE = 'group["lr"] = lr'
UPDATE = "    trainable, master, moments = program.update("
NORMS_DECAY = Edit("trainspec.params", 'Ones(), False, "norm"', 'Ones(), True, "norm"')
BIASES_DECAY = Edit("trainspec.params", 'Zeros(), False, "linear"', 'Zeros(), True, "linear"')
OFF_BY_ONE = Edit(
    "trainspec.loop",
    "peak=recipe.optimizer.lr, step=state.step,",
    "peak=recipe.optimizer.lr, step=state.step + 1,",
)
TWICE_ZERO = Edit(
    "trainspec.schedule",
    "return peak * step / warmup",
    "return peak * max(0, step - 1) / warmup",
)
NOT_DEEPSPEED = "in fp32 DeepSpeed clips: the torch edit reaches the plain engine of fp64 runs only"

FAULTS = (
    Fault(
        name="clip-by-local-norm",
        imitates="each tensor is clipped by its own norm",
        source="huggingface/transformers#581, keras-team/keras#13575",
        where=CLIP,
        jax=(
            Edit(
                OPTIM,
                "jax.tree.map(lambda g: g * factor, gradients)",
                "jax.tree.map(lambda g: g * jnp.minimum(1.0, max_norm / (jnp.sqrt(jnp.sum(g * g)) + CLIP_EPS)), gradients)",
            ),
        ),
        torch=(
            Edit(
                TORCH_OPTIM,
                "gradient.mul_(factor)",
                "gradient.mul_(torch.clamp(max_norm / (gradient.norm() + CLIP_EPS), max=1.0))",
            ),
        ),
        fp64_only=("torch",),
        note=NOT_DEEPSPEED,
    ),
    Fault(
        name="clip-after-the-update",
        imitates="gradients are clipped when the optimizer has used them already",
        source="awslabs/graphstorm#1366, Lightning-AI/pytorch-lightning#10248",
        where=CLIP,
        jax=(Edit(STEP, FACTOR, FACTOR.removeprefix("gradients = ")),),
        torch=(
            Edit(TORCH_ENGINE, TORCH_STEPS, "        self._optimizer.zero_grad()"),
            Edit(
                TORCH_ENGINE,
                "        if self._clip_norm is not None:",
                "        self._optimizer.step()\n        if self._clip_norm is not None:",
            ),
        ),
        fp64_only=("torch",),
        note=NOT_DEEPSPEED,
    ),
    Fault(
        name="clip-without-epsilon",
        imitates="clip factor max / norm, without torch's 1e-6 (optax has none)",
        source="google-deepmind/optax clip_by_global_norm against torch.nn.utils.clip_grad_norm_",
        where=CLIP,
        jax=(Edit(OPTIM, "CLIP_EPS = 1e-6", "CLIP_EPS = 0.0"),),
        torch=(Edit(TORCH_OPTIM, "CLIP_EPS = 1e-6", "CLIP_EPS = 0.0"),),
        below_bound_in=("fp32", "bf16"),
        fp64_only=("torch",),
        note=f"a relative difference of 1e-6 / norm; {NOT_DEEPSPEED}",
    ),
    Fault(
        name="adam-eps-inside-root",
        imitates="m / sqrt(v + eps)",
        source="google-deepmind/optax#417, goodfire-ai/spd#760",
        where=FIRST_UPDATE,
        jax=(
            Edit(
                OPTIM,
                "jnp.sqrt(moment2[name]) / jnp.sqrt(rates.correction2) + spec.eps",
                "jnp.sqrt(moment2[name] / rates.correction2 + spec.eps)",
            ),
        ),
        torch=torch_adamw(("(v.sqrt() + eps)", "(v + eps).sqrt()")),
    ),
    Fault(
        name="adam-no-bias-correction",
        imitates="moments are used as they are, without 1 - beta**t",
        source="google-research/bert#153, ml-explore/mlx#1640",
        where=FIRST_UPDATE,
        jax=(
            Edit(
                OPTIM,
                "return Rates(lr, 1 - spec.betas[0] ** (step + 1), 1 - spec.betas[1] ** (step + 1))",
                "return Rates(lr, 1.0, 1.0)",
            ),
        ),
        torch=torch_adamw((" / (1 - b1**t)", ""), (" / (1 - b2**t)", "")),
    ),
    Fault(
        name="adam-coupled-l2",
        imitates="weight decay is added to the gradient (Adam with L2, not AdamW)",
        source="huggingface/transformers#35504; AdamW, arXiv 1711.05101",
        where=FIRST_MOMENT,
        jax=(
            Edit(
                OPTIM,
                "assert weights is not None  # decoupled decay needs them",
                "gradients = {n: g + (spec.weight_decay * weights[n] if n in decayed else 0) for n, g in gradients.items()}",
            ),
            Edit(OPTIM, DECAYED_STEP, "step"),
        ),
        torch=(Edit(TORCH_OPTIM, "optimizer = torch.optim.AdamW(", "optimizer = torch.optim.Adam("),),
    ),
    Fault(
        name="adam-decays-norms-and-biases",
        imitates="weight decay reaches norms and biases",
        source="huggingface/transformers#35927, ServiceNow/Fast-LLM#542",
        where=Where("update", r"model\.layers\.0\.input_layernorm\.weight"),
        jax=(NORMS_DECAY, BIASES_DECAY),
        torch=(NORMS_DECAY, BIASES_DECAY),
        setup="bias",
    ),
    Fault(
        name="adam-betas-swapped",
        imitates="beta1 and beta2 change places",
        source="mila-iqia/blocks#1159 (betas backwards); Adam, arXiv 1412.6980",
        where=FIRST_MOMENT,
        jax=(Edit(OPTIM, "beta1, beta2 = spec.betas", "beta2, beta1 = spec.betas"),),
        torch=(Edit(TORCH_OPTIM, "betas=spec.betas", "betas=spec.betas[::-1]"),),
    ),
    Fault(
        name="adam-decay-without-rate",
        imitates="p -= decay * p, not lr * decay * p",
        source="tensorflow/addons#2282, NVIDIA/apex#1849; arXiv 1711.05101",
        where=FIRST_UPDATE,
        jax=(Edit(OPTIM, DECAYED_STEP, DECAYED_STEP.replace("rates.lr * ", "")),),
        torch=torch_adamw(("lr * decay * p", "decay * p")),
    ),
    Fault(
        name="rate-off-by-a-millionth",
        imitates="a learning rate that went through float32 or was rounded on its way",
        source="google-deepmind/optax schedules return float32 under x64",
        where=FIRST_UPDATE,
        jax=(Edit(OPTIM, "return Rates(lr,", "return Rates(lr * (1 + 1e-6),"),),
        torch=(Edit(TORCH_OPTIM, RATE, 'group["lr"] = lr * (1 + 1e-6)'),),
        below_bound_in=("fp32", "bf16"),
    ),
    Fault(
        name="schedule-off-by-one",
        imitates="the schedule is asked for the step after this one",
        source="huggingface/accelerate#2124, goodfire-ai/spd#699",
        where=Where("lr", "lr"),
        jax=(OFF_BY_ONE,),
        torch=(OFF_BY_ONE,),
    ),
    Fault(
        name="warmup-twice-zero",
        imitates="two updates of a warm-up have rate zero",
        source="deepspeedai/DeepSpeed#5287",
        where=Where("lr", "lr", step=2),
        jax=(TWICE_ZERO,),
        torch=(TWICE_ZERO,),
        setup="warmup",
    ),
    Fault(
        name="update-skipped",
        imitates="update 3 is skipped without a word, as after an overflow",
        source="deepspeedai/DeepSpeed#8417, huggingface/accelerate#4242",
        where=Where("moment1", EMBEDDING, step=3),
        jax=(
            Edit(
                STEP,
                UPDATE,
                f"    if state.step == 2:\n        return replace(state, step=3), metrics\n{UPDATE}",
            ),
        ),
        torch=(
            Edit(
                TORCH_STEP,
                "    state.engine.step()",
                "    state.engine.step() if state.step != 2 else state.model.zero_grad()",
            ),
        ),
    ),
    Fault(
        name="update-lost",
        imitates="moments move and weights never do",
        source="Levanter's one-step check at rtol 1e-3 passes on it (docs/numerics.md); kohya-ss/sd-scripts#91",
        where=FIRST_UPDATE,
        jax=(
            Edit(
                STEP,
                "jax.tree.map(jnp.add, stored, deltas)",
                "jax.tree.map(lambda w, d: w + 0 * d, stored, deltas)",
            ),
        ),
        torch=(Edit(TORCH_OPTIM, RATE, 'group["lr"] = 0.0'),),
    ),
)
