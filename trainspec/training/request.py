"""The options of a training run besides its recipe, and what they are on a command line."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from trainspec.checkpoints.allow import ALLOWABLE
from trainspec.errors import UserError, nearest
from trainspec.runs.clock import Clock, command_start
from trainspec.runs.stops import StopRequest
from trainspec.trace import TraceRequest


@dataclass(frozen=True)
class TrainRequest:
    """Where a run writes, whether it writes a trace, whether it resumes, and whether it says where its time went.

    With `resume` it starts from the newest checkpoint in `out`; `allow` names the groups of settings that may have changed.
    `clock` has the run's time, and `stop` hears who asks it to stop.
    """

    out: Path
    trace: TraceRequest | None = None
    resume: bool = False
    allow: Collection[str] = ()
    timings: bool = False
    clock: Clock = field(default_factory=Clock, compare=False)
    stop: StopRequest = field(default_factory=StopRequest, compare=False)


def out_directory(args: Namespace, program: str) -> Path:
    """The directory of the run: `--out`, or `runs/RECIPE-PROGRAM`. Raises UserError where that is a file."""
    out = directory_of(args, program)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a directory")
    return out


def directory_of(args: Namespace, program: str) -> Path:
    """The directory of the run, be it one or not."""
    return args.out or Path("runs") / f"{args.recipe.stem}-{program}"


def train_request(args: Namespace, out: Path) -> TrainRequest:
    """The request that the options of `train` make.

    Its clock has run since the command began, and since then it is heard who asks to stop.
    """
    return TrainRequest(
        out,
        trace=_trace_request(args),
        resume=args.resume,
        allow=_allowed(args),
        timings=args.timings,
        clock=Clock(command_start()),
        stop=args.stopping,
    )


def _trace_request(args: Namespace) -> TraceRequest | None:
    """The trace that `--trace` and `--activations` ask for."""
    if args.trace is None and args.activations is not None:
        raise UserError("--activations: needs a directory to write to; give --trace DIR as well")
    return TraceRequest(args.trace, args.activations) if args.trace else None


def _allowed(args: Namespace) -> frozenset[str]:
    """The groups that `--allow` names, such as `data,schedule`."""
    given = ",".join(args.allow)
    words = frozenset(given.replace(",", " ").split())
    for word in sorted(words - set(ALLOWABLE)):
        raise UserError(f"--allow {word}: unknown{nearest(word, ALLOWABLE)}")
    if words and not args.resume:
        raise UserError(f"--allow {given}: says what may change when a run resumes; give --resume as well")
    return words
