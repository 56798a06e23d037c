"""Faults of replicas: what is summed where it is averaged, and a rate that grows with their number."""

from __future__ import annotations

from parity.faults.fault import Fault, Where, in_every_backend
from parity.faults.rules import SCHEDULE
from parity.faults.sharding import HEAD_GRADIENT, REPLICAS_SUM
from parity.runs.edit import Edit

RESULT = "StepGradients(__loss, __tokens, __norm, __gradients, __seen, __by_probe)"

FAULTS = (
    Fault(
        name="reduced-twice-over-replicas",
        imitates="gradients are summed over the replicas by the hooks and once more by the loop",
        source="meta-pytorch/torchtune#2172, goodfire-ai/spd#546 (sums and means over ranks)",
        cause="averaged-over-ranks",
        where=HEAD_GRADIENT,
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._gradients",
                    f"return {RESULT.replace('__norm', 'global_norm(__gradients)')}",
                    "__gradients = {n: g * self.recipe.plan.replicas for n, g in __gradients.items()}\n__it",
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.engines.plain:PlainEngine.accumulate",
                    REPLICAS_SUM,
                    "__mesh.replicas.sum_(__it)",
                ),
            ),
        },
        setup="data",
        fp64_only=("torch",),
        note="in fp32 DeepSpeed takes a mean that the loss's factor undoes: there is no sum to make twice",
    ),
    Fault(
        name="loss-averaged-over-replicas",
        imitates="the loss that is reported is the mean of the replicas' sums",
        source="lightly-ai/lightly#1977 (off by 1 / world_size), meta-pytorch/torchtune#2172",
        cause="averaged-over-ranks",
        where=Where("loss", "loss_sum"),
        edits={
            "jax": (
                Edit(
                    "jaxtrain.program:Program._gradients",
                    RESULT,
                    RESULT.replace("__loss", "__loss / self.recipe.plan.replicas"),
                ),
            ),
            "torch": (
                Edit(
                    "torchtrain.step:train_step",
                    "state.mesh.total(__loss)",
                    "__it / state.mesh.replicas.size",
                ),
            ),
        },
        setup="data",
    ),
    Fault(
        name="rate-times-replicas",
        imitates="the rate is multiplied by the number of replicas",
        source="spellml/deeplab-voc-2012#3, DTennant/reid_baseline_with_syncbn#15; linear scaling, arXiv 1706.02677",
        cause="schedule",
        where=Where("lr", "lr"),
        edits=in_every_backend(
            Edit(
                *SCHEDULE,
                "learning_rate(__schedule, peak=__peak * recipe.plan.replicas, step=__step, steps=__steps)",
            )
        ),
        setup="data",
    ),
)
