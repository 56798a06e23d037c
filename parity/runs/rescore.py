"""The float64 reference of generated tokens: whole rows, with the tokens that were generated given.

    python -m parity.runs.rescore JOB.json

Each row is a prompt with the tokens that both sides generated after it; its logits are made in one forward pass, without a
cache, and `draws` times more with every result rounded as a narrower type rounds it (`trainspec.step.Reference.logits`).

JOB is a `RescoreJob`. Row i of it gets OUT/row-00000i.safetensors, a `RescoredRow`. It runs as its own program, which loads the backend
by name.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from parity.comparison.rescored import RescoredRow, Row
from trainspec.backends import BACKENDS
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.newest import newest_state
from trainspec.files.hf import write_model
from trainspec.files.model_config import config_of
from trainspec.generation.choice import log_prob
from trainspec.generation.rows import STRETCH, batch_of, room
from trainspec.plans.names import Backend
from trainspec.plans.plan import Plan
from trainspec.recipe import ModelSource, load_recipe
from trainspec.runs.run import Run
from trainspec.step import RMS_ROUNDING, Reference, Roundings
from trainspec.text.store import find_tokenizer

Array = NDArray[Any]
# Logits that are made at once: 512 MB in float64.
LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class RescoreJob:
    """The reference's backend and recipe, the rows, and the directory of a run whose newest checkpoint is read, if any.

    `computed` is the type that the sides compute in, to which the weights are rounded, `units` are its unit roundoffs: of stored
    results, of wide ones and of weights' gradients.
    """

    backend: Backend
    recipe: str
    overrides: list[str]
    start: str | None
    computed: str
    units: tuple[float, float, float]
    draws: int
    rows: list[Row]
    out: str


def row_file(out: Path, number: int) -> Path:
    """The file of a row."""
    return out / f"row-{number:06d}.safetensors"


def read_rescored(out: Path, count: int) -> list[RescoredRow]:
    """What the program wrote of `count` rows."""
    return [RescoredRow(**load_file(row_file(out, number))) for number in range(count)]


def rescored(row: Row, logits_TV: Array, drawn: Sequence[Array]) -> RescoredRow:
    """A row's numbers from its logits after the prompt and each agreed token, [T + 1, V], and those of each draw."""
    ids, count = row.agreed, len(row.agreed)
    before = _log_probs(logits_TV, ids)
    moved = np.zeros(count)
    for each in drawn:
        moved += np.square(_log_probs(each, ids) - before) / len(drawn)
    vocab = logits_TV.shape[-1] if row.parts else 0
    return RescoredRow(
        before,
        moved,
        np.abs(logits_TV[:count]).max(axis=-1, initial=0.0),
        logits_TV[count, :vocab].copy(),
        np.array([each[count, :vocab] for each in drawn]).reshape(len(drawn), vocab),
    )


def _log_probs(logits_TV: Array, ids: Sequence[int]) -> Array:
    """The log-probability of each of T ids, of T + 1 logits those before it."""
    return np.array([log_prob(logits_V, token) for logits_V, token in zip(logits_TV, ids, strict=False)])


class Rescorer:
    """A backend in this process with the reference's weights: float64, one device."""

    def __init__(self, job: RescoreJob) -> None:
        recipe = load_recipe(Path(job.recipe), job.overrides)
        recipe = recipe.model_copy(update={"plan": Plan(attention=recipe.plan.attention)})
        program = BACKENDS[job.backend].program
        cluster = importlib.import_module(f"{program}.cluster")
        self.run: Run = cluster.start(recipe)
        self.backend = cast(Reference[Any], importlib.import_module(f"{program}.step"))
        self.job, self._roundings = job, Roundings(*(size * RMS_ROUNDING for size in job.units))
        if job.start is None:
            state = self.backend.init_state(self.run)
        else:
            tokenizer = find_tokenizer(recipe.data, self.run.directory, recipe.model.from_)
            state, _ = newest_state(
                self.backend,
                self.run,
                out=Path(job.start),
                processes=cluster.processes(),
                tokenizer_digest=tokenizer.digest,
            )
        self._state = self._as_computed(state)

    def _as_computed(self, state: Any) -> Any:
        """The state with every weight rounded to the type that the sides compute in."""
        weights = self.backend.weights_of(state, frozen=True)
        narrow = {name: _rounded(weight, self.job.computed) for name, weight in weights.items()}
        if all(np.array_equal(weights[name], narrow[name]) for name in weights):
            return state
        directory, run = Path(self.job.out) / "weights", self.run
        model = ((p.name, narrow[p.name]) for p in run.model_table)
        write_model(directory, model, companions_from=run.directory, config=config_of(run.spec))
        source = ModelSource.model_validate({"from": str(directory)})
        recipe = run.recipe.model_copy(update={"model": source})
        started = self.backend.init_state(replace(run, recipe=recipe, directory=directory), like=state)
        trained = {p.name: narrow[p.name] for p in run.trained}
        zeros = {name: np.zeros_like(weight) for name, weight in trained.items()}
        return self.backend.restore(started, Checkpoint(state.step, trained, zeros, zeros))

    def write(self, out: Path) -> None:
        """Rescore all rows, and write each to `out`."""
        rows, limit = self.job.rows, room(self.run)
        longest = max(len(row.prompt) + len(row.agreed) for row in rows)
        length = min(-(-longest // STRETCH) * STRETCH, limit)
        size = min(len(rows), max(1, LOGITS_AT_ONCE // (length * self.run.spec.vocab)))
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            batch, _ = batch_of([[*row.prompt, *row.agreed] for row in some], limit=limit, count=size)
            exact = _wanted(some, self.backend.logits(self._state, batch))
            drawn = [
                _wanted(some, self.backend.logits(self._state, batch, roundings=self._roundings, draw=draw))
                for draw in range(self.job.draws)
            ]
            for at, row in enumerate(some):
                found = rescored(row, exact[at], [each[at] for each in drawn])
                save_file(vars(found), row_file(out, first + at))
            print(f"reference: {first + len(some)} of {len(rows)} responses", flush=True)


def _wanted(rows: Sequence[Row], logits_BSV: Array) -> list[Array]:
    """Of every row the logits [T + 1, V] after its prompt and each agreed token."""
    starts = [len(row.prompt) - 1 for row in rows]
    return [
        logits_BSV[at, start : start + len(row.agreed) + 1].astype(np.float64)
        for at, (start, row) in enumerate(zip(starts, rows, strict=True))
    ]


def _rounded(weight: Array, computed: str) -> Array:
    """As a run stores it, in float32 at the widest but for float64, and then computes with it."""
    stored = weight if computed == "float64" else weight.astype(np.float32)
    return stored.astype(computed).astype(np.float64)


def main() -> None:
    """Run the job in the file named on the command line."""
    said = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    job = RescoreJob(**said | {"rows": [Row(**row) for row in said["rows"]], "units": tuple(said["units"])})
    Rescorer(job).write(Path(job.out))


if __name__ == "__main__":
    main()
