"""Learning-rate schedules in plain Python, so that both backends get the same double.

Warm-up and decay follow Hugging Face's `get_*_schedule_with_warmup`: steps count from 0, the first update of
a warm-up has rate 0, and the decay reaches `final_ratio` at `steps`. Past the end the rate stays there
(Hugging Face's cosine would rise again). A warm-up given as a share is rounded up, as its Trainer does.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self, assert_never

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Schedule(BaseModel):
    """The learning rate over the run. Give the warm-up in updates or as a ratio, not both."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    kind: Literal["constant", "linear", "cosine"] = "cosine"
    """The shape of the decay after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates over which the rate rises from 0 to its peak."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The warm-up as a share of the run's updates."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The rate at the end, as a share of the peak."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps} and schedule.warmup_ratio={self.warmup_ratio}: "
                "give one of them and set the other to 0"
            )
        return self

    def warmup(self, steps: int) -> int:
        """How many of a run's `steps` updates are warm-up."""
        return math.ceil(self.warmup_ratio * steps) if self.warmup_ratio else self.warmup_steps


def learning_rate(schedule: Schedule, *, peak: float, step: int, steps: int) -> float:
    """The rate of update `step` (counted from 0) in a run of `steps` updates."""
    warmup = schedule.warmup(steps)
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
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
