"""What is to be measured, and what the options of `eval` are on a command line."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from trainspec.errors import UserError
from trainspec.generation.request import Settings, settings


@dataclass(frozen=True)
class EvaluationRequest:
    """`out` is the run's directory: its newest checkpoint is read, and what is measured is written there.

    `settings` are those of the answers, `examples` how many held-out records are answered, the first ones; None: all. With
    `loss_only` the newest checkpoint's held-out loss is all that is measured, and nothing is written.
    """

    out: Path
    settings: Settings
    examples: int | None = None
    loss_only: bool = False


def evaluation_request(args: Namespace, out: Path) -> EvaluationRequest:
    """The request that the options of `eval` make. Raises UserError."""
    if args.examples is not None and args.examples < 1:
        raise UserError(f"--examples {args.examples}: give 1 or more, or --loss-only for none")
    if args.examples is not None and args.loss_only:
        raise UserError("--examples: has no effect with --loss-only, which has no example answered")
    return EvaluationRequest(out, settings(args), args.examples, args.loss_only)
