"""lr(step): the only schedules of the repository, in plain Python, so that both backends get the same double.

Warm-up and decay follow Hugging Face's `get_*_schedule_with_warmup`: steps count from 0, the first update of
a warm-up has rate 0, and the decay reaches `final_ratio` at `steps`. Past the end the rate stays there
(Hugging Face's cosine would rise again).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field


class Schedule(BaseModel):
    """The shape of the learning rate over the run; `final_ratio` is its end as a share of the peak."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0


def learning_rate(schedule: Schedule, *, peak: float, step: int, steps: int) -> float:
    """The rate of update `step` (counted from 0) in a run of `steps` updates."""
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps))
    match schedule.kind:
        case "constant":
            return peak
        case "linear":
            share = 1.0 - progress
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        case other:
            assert_never(other)
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * share)
