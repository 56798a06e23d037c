"""Faults of a resume: the second part of a run begins with another batch, count, rate, state or dropout than the first left.

The first part is trained without them (`parity.faults.run`), so each shows at the first step after it.
"""

from __future__ import annotations

from parity.faults.fault import RESUMED_AFTER, Fault, Where, at_point, in_every_backend
from parity.faults.rules import SCHEDULE
from parity.faults.update import EMBEDDING
from parity.runs.edit import Edit

FIRST = RESUMED_AFTER + 1
STARTS = "parity.faults.substitutes.starts"
LOAD = "trainspec.checkpoints.checkpoint:load"


def loaded(moments: str = "", weights: str = "") -> dict:
    """What a checkpoint holds, changed by functions of the substitutes when it is loaded."""
    made = "Checkpoint(__step, __weights, __first, __second)"
    functions = ", ".join(name for name in (moments, weights) if name)
    arguments = [
        f"{weights}(__weights)" if weights else "__weights",
        *(f"{moments}({each})" if moments else each for each in ("__first", "__second")),
    ]
    return in_every_backend(
        Edit(
            LOAD,
            f"return {made}",
            f"from {STARTS} import {functions}\nreturn Checkpoint(__step, {', '.join(arguments)})",
        )
    )


def from_the_checkpoint_before(group: str) -> dict:
    """One kind of array is read from the checkpoint before the newest."""
    return in_every_backend(
        Edit(
            LOAD,
            "files = [path / name for name in files_of(kind, manifest.digests)]",
            "from trainspec.checkpoints.folders import complete\n"
            f"source = complete(path.parents[1])[-2] if kind == {group!r} else path\n"
            "files = [source / name for name in files_of(kind, manifest.digests)]",
        )
    )


_LOADED = "return Checkpoint(__step, __weights, __first, __second)"
# A state of which half is not finite is not saved, which would end the run before its trace is compared.
_SAVED_ANYWAY = Edit("trainspec.checkpoints.portable:write_shards", "_is_finite(shard.array)", "True")

FAULTS = (
    Fault(
        name="resume-reads-a-batch-again",
        imitates="a resumed run reads its last batch again",
        source="huggingface/accelerate#4071, google/grain#1178",
        cause="resume-cursor",
        where=Where("batch", "input_ids", step=FIRST),
        edits=in_every_backend(
            Edit(
                "trainspec.training.loop:follow",
                "data.train.batch(__step, __examples)",
                "data.train.batch(__step - bool(steps.start), __examples)",
            )
        ),
        setup="resume",
    ),
    Fault(
        name="resume-restarts-adam-s-count",
        imitates="Adam's count of steps, and with it the bias correction, begins at one after a resume",
        source="goodfire-ai/spd#678",
        cause="resume-count",
        where=Where("update", EMBEDDING, step=FIRST),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.step:train_step",
                    "rates(__optimizer, lr=__lr, step=__step)",
                    f"rates(__optimizer, lr=__lr, step=__step - {RESUMED_AFTER})",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.step:restore", "set_steps(__optimizer, __step)", "set_steps(__optimizer, 0)"
                ),
            ),
        },
        setup="resume",
    ),
    Fault(
        name="resume-restarts-the-schedule",
        imitates="the schedule begins again after a resume",
        source="huggingface/accelerate#2124, starVLA/starVLA#210",
        cause="schedule-offset",
        where=Where("lr", "lr", step=FIRST),
        edits=in_every_backend(
            Edit(
                *SCHEDULE,
                f"learning_rate(__schedule, peak=__peak, step=__step - {RESUMED_AFTER}, steps=__steps)",
            )
        ),
        setup="resume",
    ),
    Fault(
        name="resume-of-an-older-moment",
        imitates="the first moments are those of the checkpoint before",
        source="NVIDIA/Megatron-LM#2016 (the optimizer has the steps 2250 and 1300)",
        cause="resume-state",
        where=Where("resume", r"moment1/.*", step=FIRST),
        edits=from_the_checkpoint_before("moment1"),
        setup="resume",
    ),
    Fault(
        name="resume-of-older-weights",
        imitates="the weights are those of the checkpoint before, the moments the newest",
        source="pytorch/pytorch#35047 (a resumed run goes another way)",
        cause="resume-state",
        where=Where("resume", r"weight/.*", step=FIRST),
        edits=from_the_checkpoint_before("weights"),
        setup="resume",
    ),
    Fault(
        name="resume-of-an-older-shard",
        imitates="the lower half of every first moment, as another process wrote it, is that of the checkpoint before",
        source="mosaicml/composer#2146 (a rank whose save failed resumes from an older checkpoint)",
        cause="resume-state",
        where=Where("resume", r"moment1/.*", step=FIRST),
        edits=in_every_backend(
            Edit(
                LOAD,
                _LOADED,
                f"from {STARTS} import with_an_older_half\n"
                "return Checkpoint(__step, __weights, with_an_older_half(__first, path, 'moment1'), __second)",
            )
        ),
        setup="resume",
    ),
    Fault(
        name="resume-swaps-moments",
        imitates="the first moment is restored as the second, and the second as the first",
        source="no report of it: optax's mu and nu for torch's exp_avg and exp_avg_sq, in the wrong order",
        cause="swapped-moments",
        where=Where("resume", r"moment1/.*", step=FIRST),
        edits=in_every_backend(
            Edit(LOAD, _LOADED, "return Checkpoint(__step, __weights, __second, __first)"), _SAVED_ANYWAY
        ),
        setup="resume",
    ),
    Fault(
        name="resume-loses-adapter-names",
        imitates="an adapter's weights have names without `base_model.model.`, none is found, and it stays as the run started",
        source="redai-studio/Relax#262, meta-pytorch/torchtune#2537 (strict=False)",
        cause="resume-names",
        where=Where("resume", r"weight/base_model\.model\..*lora_.*", step=FIRST),
        edits=in_every_backend(
            Edit(
                LOAD,
                _LOADED,
                f"from {STARTS} import of_the_start\n"
                "return Checkpoint(__step, of_the_start(__weights, run), __first, __second)",
            )
        ),
        setup="resume-adapter",
    ),
    Fault(
        name="resume-without-moments",
        imitates="the optimizer's state is not restored: both moments begin at zero",
        source="thinking-machines-lab/tinker-feedback#127, EvolvingLMMs-Lab/OneVision-Encoder#65",
        cause="resume-state",
        where=Where("resume", r"moment1/.*", step=FIRST),
        edits=loaded(moments="zeros"),
        setup="resume",
    ),
    Fault(
        name="resume-casts-moments",
        imitates="both moments are rounded to bfloat16 when they are restored",
        source="TensorAuto/OpenTau#184",
        cause="rounded-state",
        where=Where("resume", r"moment1/.*", step=FIRST),
        edits=loaded(moments="rounded_to_bf16"),
        setup="resume",
    ),
    Fault(
        name="resume-from-rounded-weights",
        imitates="the weights are restored from a copy in bfloat16",
        source="deepspeedai/DeepSpeed#1800 (fp32 masters made of bf16 weights), Physical-Intelligence/openpi#989",
        cause="rounded-state",
        where=Where("resume", r"weight/.*", step=FIRST),
        edits=loaded(weights="rounded_to_bf16"),
        setup="resume",
    ),
    Fault(
        name="resume-restarts-dropout",
        imitates="dropout draws the masks of the run's first steps again",
        source="NVIDIA-NeMo/Megatron-Bridge#5257 (generators after a resume)",
        cause="resume-dropout",
        where=Where("activation", at_point("q_proj.lora_A").tensor, step=FIRST),
        edits={
            "jax": (
                Edit("jaxtrain.step:train_step", "jnp.int32(__step)", f"jnp.int32(__step - {RESUMED_AFTER})"),
            ),
            "torch": (
                Edit(
                    "torchtrain.step:_Microbatches._move_dropout",
                    "self._state.step",
                    f"self._state.step - {RESUMED_AFTER}",
                ),
            ),
        },
        setup="resume-adapter",
    ),
)
