"""Many runs of one program in one process: what it imports and compiles is imported and compiled once.

    python -m parity.runs.series WORK.json ENDED.jsonl

WORK is {"program": PROGRAM, "groups": [[{"argv": [...], "log": FILE}, ...], ...]}. PROGRAM is a backend's, whose `train`
command line `argv` is, or `reference`, where `argv` is the file of a `parity.runs.job.Job`. The recipes of a group differ in
the model's weights and in the data alone: all its runs use the programs that the first has compiled, so their numbers are
those of separate processes. ENDED gets a line {"code": ..., "last": ...} when a run has ended, in the order of WORK.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from parity.runs.replay import Replayer, replay
from parity.runs.work import REFERENCE
from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.copies import Copy
from trainspec.checkpoints.shards import Shard
from trainspec.checkpoints.states import ArrayFormat
from trainspec.command import backend_parser, run_command
from trainspec.contract import Cluster
from trainspec.data import Batch
from trainspec.errors import EXIT_CRASHED, EXIT_DONE
from trainspec.recipe import load_recipe
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run
from trainspec.step import Arrays, Backend, Decoding, Metrics
from trainspec.trace import Keep
from trainspec.training import loop
from trainspec.training.request import out_directory, train_request


class SharedPrograms:
    """A backend whose states all use the compiled programs of the first."""

    def __init__(self, backend: Backend[Any]) -> None:
        self._backend, self._first = backend, None

    def init_state(self, run: Run, *, like: Any = None) -> Any:
        """The run before its first update."""
        state = self._backend.init_state(run, like=like or self._first)
        self._first = self._first or state
        return state

    def feed(self, state: Any, batch: Batch) -> Batch:
        """The backend's."""
        return self._backend.feed(state, batch)

    def train_step(
        self, state: Any, batch: Batch, *, lr: float, keep: Keep = "nothing"
    ) -> tuple[Any, Metrics]:
        """The backend's."""
        return self._backend.train_step(state, batch, lr=lr, keep=keep)

    def eval_step(self, state: Any, batch: Batch) -> tuple[float, int]:
        """The backend's."""
        return self._backend.eval_step(state, batch)

    def next_logits(self, state: Any, batch: Batch, last: NDArray[np.int32]) -> NDArray[Any]:
        """The backend's."""
        return self._backend.next_logits(state, batch, last)

    def decoding(self, state: Any, *, length: int) -> Decoding | None:
        """The backend's."""
        return self._backend.decoding(state, length=length)

    def weights_of(self, state: Any, *, frozen: bool = False) -> Arrays:
        """The backend's."""
        return self._backend.weights_of(state, frozen=frozen)

    def moments_of(self, state: Any) -> tuple[Arrays, Arrays]:
        """The backend's."""
        return self._backend.moments_of(state)

    def shards_of(self, state: Any, copy: Copy = np.copy) -> Iterator[Shard]:
        """The backend's."""
        return self._backend.shards_of(state, copy)

    def copied_bytes(self, state: Any) -> list[int]:
        """The backend's."""
        return self._backend.copied_bytes(state)

    def restore(self, state: Any, checkpoint: Checkpoint) -> Any:
        """The backend's."""
        return self._backend.restore(state, checkpoint)

    def native_format(self, run: Run, processes: Processes) -> ArrayFormat[Any]:
        """The backend's."""
        return self._backend.native_format(run, processes)


class Trainings:
    """The runs of a group of `PROGRAM train ...`."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._cluster = cast(Cluster, importlib.import_module(f"{program}.cluster"))
        self._backend = SharedPrograms(cast(Backend[Any], importlib.import_module(f"{program}.step")))

    def __call__(self, argv: Sequence[str]) -> int:
        """Run one; the exit code."""
        return run_command(self._train, backend_parser(self._program), argv)

    def _train(self, args: Namespace) -> None:
        recipe = load_recipe(args.recipe, args.overrides)
        request = train_request(args, out_directory(args, self._program))
        run = self._cluster.start(recipe)
        try:
            devices = self._cluster.describe_devices(recipe.plan)
            loop.train(self._backend, run, request, processes=self._cluster.processes(), devices=devices)
        finally:
            self._cluster.finish()


class References:
    """The float64 references of a group's runs."""

    def __init__(self) -> None:
        self._last: Replayer | None = None

    def __call__(self, argv: Sequence[str]) -> int:
        """Run one; the exit code."""
        self._last = replay(Path(argv[0]), like=self._last)
        return EXIT_DONE


def main() -> None:
    """Run all of WORK."""
    work, ended = map(Path, sys.argv[1:])
    asked = json.loads(work.read_text(encoding="utf-8"))
    for group in asked["groups"]:
        runs = References() if asked["program"] == REFERENCE else Trainings(asked["program"])
        for one in group:
            code, last = _logged(runs, one["argv"], Path(one["log"]))
            with ended.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"code": code, "last": last}) + "\n")
        del runs
        gc.collect()  # the programs of a group are not used again


def _logged(run: Callable[[Sequence[str]], int], argv: Sequence[str], log: Path) -> tuple[int, str]:
    """The exit code of one run, and the last line of its log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            code = run(argv)
        except SystemExit as stop:  # the parser's
            code = int(stop.code or 0)
        except Exception:
            traceback.print_exc()
            code = EXIT_CRASHED
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return code, lines[-1].strip() if lines else ""


if __name__ == "__main__":
    main()
