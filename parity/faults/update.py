"""Faults of the update: clipping, AdamW, the schedule, updates that do not happen."""

from __future__ import annotations

from parity.faults.fault import Fault, Where, in_every_backend
from parity.faults.written_out import ADAMW, ADAMW_WRITTEN_OUT
from parity.runs.edit import Edit

EMBEDDING = r"model\.embed_tokens\.weight"  # the first tensor in forward order, and one that decays
CLIP = Where("clip", "clip_factor")
FIRST_MOMENT, FIRST_UPDATE = Where("moment1", EMBEDDING), Where("update", EMBEDDING)
RATES, TORCH_RATE = "Rates(__lr, __correction1, __correction2)", '__group["lr"] = __lr'
NOT_DEEPSPEED = "in fp32 DeepSpeed clips: the torch edit reaches the plain engine of fp64 runs only"

FAULTS = (
    Fault(
        name="clip-by-local-norm",
        imitates="each tensor is clipped by its own norm",
        source="huggingface/transformers#581, keras-team/keras#13575",
        cause="clip-scope",
        where=CLIP,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.optim:clip",
                    "__g * __factor",
                    "__g * jnp.minimum(1.0, max_norm / (jnp.sqrt(jnp.sum(__g * __g)) + CLIP_EPS))",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.optim:clip",
                    "__g.mul_(__factor)",
                    "__g.mul_(torch.clamp(max_norm / (__g.norm() + CLIP_EPS), max=1.0))",
                ),
            ),
        },
        fp64_only=("torch",),
        note=NOT_DEEPSPEED,
    ),
    Fault(
        name="clip-after-the-update",
        imitates="gradients are clipped after the optimizer has used them",
        source="awslabs/graphstorm#1366, Lightning-AI/pytorch-lightning#10248",
        cause="clip-missing",
        where=CLIP,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._update",
                    "__g = clip(__g, __norm, max_norm=__max)",
                    "clip(__g, __norm, max_norm=__max)",
                ),
            ),
            "torch": (
                Edit("torchtrain.engines.plain:PlainEngine.step", "self._optimizer.step()", "None"),
                Edit("torchtrain.engines.plain:PlainEngine.step", "", "self._optimizer.step()"),
            ),
        },
        fp64_only=("torch",),
        note=NOT_DEEPSPEED,
    ),
    Fault(
        name="clip-without-epsilon",
        imitates="clip factor max / norm, without torch's 1e-6 (optax has none)",
        source="google-deepmind/optax clip_by_global_norm against torch.nn.utils.clip_grad_norm_",
        cause="clip-epsilon",
        where=CLIP,
        edits={
            "jax": (Edit("jaxtrain.optim", "CLIP_EPS = 1e-6", "CLIP_EPS = 0.0"),),
            "torch": (Edit("torchtrain.optim", "CLIP_EPS = 1e-6", "CLIP_EPS = 0.0"),),
        },
        below_bound_in=("fp32", "bf16"),
        fp64_only=("torch",),
        note=f"a relative difference of 1e-6 / norm; {NOT_DEEPSPEED}",
    ),
    Fault(
        name="adam-eps-inside-root",
        imitates="m / sqrt(v + eps)",
        source="google-deepmind/optax#417, goodfire-ai/spd#760",
        cause="adam-epsilon",
        where=FIRST_UPDATE,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.optim:make_optimizer",
                    "jnp.sqrt(__v) / jnp.sqrt(__correction) + __eps",
                    "jnp.sqrt(__v / __correction + __eps)",
                ),
            ),
            "torch": (*ADAMW_WRITTEN_OUT, Edit(ADAMW, "__v.sqrt() + __eps", "(__v + __eps).sqrt()")),
        },
    ),
    Fault(
        name="adam-no-bias-correction",
        imitates="moments are used without bias correction (1 - beta**t)",
        source="google-research/bert#153, ml-explore/mlx#1640",
        cause="bias-correction",
        where=FIRST_UPDATE,
        edits={
            "jax": (Edit("jaxtrain.optim:rates", RATES, "Rates(__lr, 1.0, 1.0)"),),
            "torch": (*ADAMW_WRITTEN_OUT, Edit(ADAMW, "1 - b1**t", "1.0"), Edit(ADAMW, "1 - b2**t", "1.0")),
        },
    ),
    Fault(
        name="adam-coupled-l2",
        imitates="weight decay is added to the gradient (Adam with L2, not AdamW)",
        source="huggingface/transformers#35504; AdamW, arXiv 1711.05101",
        cause="decay-in-gradient",
        where=FIRST_MOMENT,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.optim:make_optimizer.update",
                    "__m = jax.tree.map(__f, __moments.moment1, __gradients)",
                    "__gradients = {n: g + (spec.weight_decay * weights[n] if n in decayed else 0) for n, g in __gradients.items()}\n"
                    "__it",
                ),
                Edit(
                    "jaxtrain.optim:make_optimizer.update",
                    "__step - __decay if __decays else __step",
                    "__step",
                ),
            ),
            "torch": (Edit("torchtrain.optim:make_optimizer", "torch.optim.AdamW", "torch.optim.Adam"),),
        },
    ),
    Fault(
        name="adam-decays-norms-and-biases",
        imitates="weight decay is applied to norms and biases",
        source="huggingface/transformers#35927, ServiceNow/Fast-LLM#542",
        cause="decay-mask",
        where=Where("update", r"model\.layers\.0\.input_layernorm\.weight"),
        edits=in_every_backend(
            Edit("trainspec.families.llama:norm", "False", "True"),
            Edit("trainspec.families.llama:linear", "False", "True"),
        ),
        setup="bias",
    ),
    Fault(
        name="adam-betas-swapped",
        imitates="beta1 and beta2 are swapped",
        source="mila-iqia/blocks#1159 (betas backwards); Adam, arXiv 1412.6980",
        cause="betas",
        where=FIRST_MOMENT,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.optim:make_optimizer",
                    "__beta1, __beta2 = __spec.betas",
                    "__beta2, __beta1 = __spec.betas",
                ),
            ),
            "torch": (Edit("torchtrain.optim:make_optimizer", "__spec.betas", "__spec.betas[::-1]"),),
        },
    ),
    Fault(
        name="adam-decay-without-rate",
        imitates="p -= decay * p, not lr * decay * p",
        source="tensorflow/addons#2282, NVIDIA/apex#1849; arXiv 1711.05101",
        cause="decay-size",
        where=FIRST_UPDATE,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.optim:make_optimizer", "__rates.lr * __spec.weight_decay", "__spec.weight_decay"
                ),
            ),
            "torch": (*ADAMW_WRITTEN_OUT, Edit(ADAMW, "lr * decay", "decay")),
        },
    ),
    Fault(
        name="rate-off-by-a-millionth",
        imitates="the learning rate is rounded to float32 on its way",
        source="google-deepmind/optax schedules return float32 under x64",
        cause="rate-applied",
        where=FIRST_UPDATE,
        edits={
            "jax": (
                Edit("jaxtrain.optim:rates", RATES, "Rates(__lr * (1 + 1e-6), __correction1, __correction2)"),
            ),
            "torch": (
                Edit("torchtrain.optim:set_learning_rate", TORCH_RATE, '__group["lr"] = __lr * (1 + 1e-6)'),
            ),
        },
        below_bound_in=("fp32", "bf16"),
    ),
    Fault(
        name="schedule-off-by-one",
        imitates="the schedule is asked for the step after this one",
        source="huggingface/accelerate#2124, goodfire-ai/spd#699",
        cause="schedule-offset",
        where=Where("lr", "lr"),
        edits=in_every_backend(
            Edit(
                "trainspec.training.loop:follow",
                "learning_rate(__schedule, peak=__peak, step=__step, steps=__steps)",
                "learning_rate(__schedule, peak=__peak, step=__step + 1, steps=__steps)",
            )
        ),
    ),
    Fault(
        name="warmup-twice-zero",
        imitates="two updates of a warm-up have learning rate zero",
        source="deepspeedai/DeepSpeed#5287",
        cause="schedule-offset",
        where=Where("lr", "lr", step=2),
        edits=in_every_backend(
            Edit(
                "trainspec.schedule:learning_rate",
                "__peak * __step / __warmup",
                "__peak * max(0, __step - 1) / __warmup",
            )
        ),
        setup="warmup",
    ),
    Fault(
        name="update-skipped",
        imitates="update 3 is silently skipped, as after an overflow",
        source="deepspeedai/DeepSpeed#8417, huggingface/accelerate#4242",
        cause="update-skipped",
        where=Where("moment1", EMBEDDING, step=3),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.step:train_step",
                    "__metrics = _metrics(__program, __found, __keep)",
                    "__it\nif state.step == 2:\n    return replace(state, step=3), __metrics",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.step:train_step",
                    "__state.engine.step()",
                    "__it if __state.step != 2 else __state.model.zero_grad()",
                ),
            ),
        },
    ),
    Fault(
        name="update-lost",
        imitates="moments are updated and weights are not",
        source="Levanter's one-step check at rtol 1e-3 passes on it (docs/numerics.md); kohya-ss/sd-scripts#91",
        cause="update-lost",
        where=FIRST_UPDATE,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._update",
                    "jax.tree.map(jnp.add, __weights, __deltas)",
                    "jax.tree.map(lambda w, d: w + 0 * d, __weights, __deltas)",
                ),
            ),
            "torch": (Edit("torchtrain.optim:set_learning_rate", TORCH_RATE, '__group["lr"] = 0.0'),),
        },
    ),
)
