"""What is to be measured, and what the options of `eval` are on a command line."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path

from trainspec.errors import UserError
from trainspec.generation.request import Settings, settings

_DEFAULT = Settings()
# Options whose names are not those of the settings.
_OPTIONS = {"caches": "--no-cache"}


@dataclass(frozen=True)
class EvaluationRequest:
    """`out` is the run's directory: its newest checkpoint is read, and what is measured is written there.

    `settings` are those of the answers, `examples` how many held-out records are answered, the first ones; None: all. With
    `loss_only` the newest checkpoint's held-out loss is all that is measured, and nothing is written. `untrained`: the starting
    weights alone are measured, and no checkpoint is read.
    """

    out: Path
    settings: Settings
    examples: int | None = None
    loss_only: bool = False
    untrained: bool = False

    @property
    def trained_in(self) -> Path | None:
        """Where the checkpoint is that is read."""
        return None if self.untrained else self.out

    def answer_options(self) -> list[str]:
        """The options that say how records are answered, of those that were given."""
        given = ["--examples"] if self.examples is not None else []
        for mine, default in ((self.settings, _DEFAULT), (self.settings.sampling, _DEFAULT.sampling)):
            changed = [f.name for f in fields(mine) if getattr(mine, f.name) != getattr(default, f.name)]
            given += [
                _OPTIONS.get(name, f"--{name.replace('_', '-')}") for name in changed if name != "sampling"
            ]
        return given


def evaluation_request(args: Namespace, out: Path) -> EvaluationRequest:
    """The request that the options of `eval` make. Raises UserError."""
    if args.examples is not None and args.examples < 1:
        raise UserError(f"--examples {args.examples}: give 1 or more, or --loss-only for none")
    request = EvaluationRequest(out, settings(args), args.examples, args.loss_only, args.untrained)
    if args.loss_only and (given := request.answer_options()):
        raise UserError(
            f"{given[0]}: has no effect with --loss-only, which has no record answered; leave it out"
        )
    return request
