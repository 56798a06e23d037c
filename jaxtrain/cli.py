"""jaxtrain train | eval | generate | export RECIPE: the same commands and flags as torchtrain."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from trainspec.command import backend_parser, run_command

PROGRAM = "jaxtrain"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is one of those that `trainspec.command` lists."""
    return run_command(_run, backend_parser(PROGRAM), argv)


def _run(args: Namespace) -> None:
    # What --help does without.
    from jaxtrain import commands

    commands.run(args)
