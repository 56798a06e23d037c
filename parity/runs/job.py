"""What `parity.runs.replay` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trainspec.plans.names import Backend


@dataclass(frozen=True)
class Job:
    """The input of `parity.runs.replay`: the reference's backend and recipe, and the runs (traces) that it repeats.

    `draws` is the number of repetitions of the first run with simulated roundings, of unit roundoffs `units` (of stored
    results, of wide ones and of weights' gradients); step `activations_at`, or `all`, is recorded with activations. `computed` is the type that the runs
    compute in, to which their weights are rounded. `ended` names a file for each run that is there once the run has ended:
    its trace may still grow until then. Without names all traces are whole.
    """

    backend: Backend
    recipe: str
    overrides: list[str]
    computed: str
    units: tuple[float, float, float]
    draws: int
    activations_at: int | Literal["all"] | None
    runs: list[str]
    out: str
    ended: list[str] = field(default_factory=list)
