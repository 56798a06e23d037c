"""`parity check|generate|diff|matrix|faults`: the command line."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from parity.judging.steps import DEFAULT_STEPS
from parity.matrix.pages import FAMILIES_PAGE, STATUS_PAGE
from trainspec.command import ArgumentParser, add_recipe, directory, run_command
from trainspec.generation.options import add_decoding, add_prompts
from trainspec.plans.names import DEVICES, Backend, Policy


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 (pass), 1 (fail) or 2 (the user's mistake)."""
    return run_command(_run, parser(), argv)


def parser() -> ArgumentParser:
    """The command line's arguments."""
    parser = ArgumentParser(prog="parity", description="Prove that two runs did the same training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, what) in _COMMANDS.items():
        add(commands.add_parser(name, help=what))
    return parser


def _add_check(check: ArgumentParser) -> None:
    add_recipe(check)
    _add_sides(check, left='a backend and its own settings, such as "jax plan.data=2" or jax@gpu (jax)')
    check.add_argument(
        "--steps", type=_count, metavar="N", help=f"how many updates to compare ({DEFAULT_STEPS})"
    )
    check.add_argument(
        "--resume-at", metavar="[SIDE:]N",
        help="train both sides, or left:N or right:N alone, up to step N, then --resume to the end",
    )  # fmt: skip
    check.add_argument(
        "--continue-from", choices=("own", "other"), default="own",
        help="with --resume-at left:N or right:N: from its own checkpoint (the default), or the other side's",
    )  # fmt: skip
    check.add_argument(
        "--small", action="store_true",
        help="prove a small twin of the recipe: the same family, flags, method, data and plan axes, small sizes",
    )  # fmt: skip
    check.add_argument(
        "--device", choices=DEVICES, default="cpu",
        help="where both sides and the float64 reference compute, one after the other: on the cores (cpu, the default), or on what "
        "is there (auto); a side may name its own, such as --right torch@cpu",
    )  # fmt: skip
    check.add_argument(
        "--out", type=directory, metavar="DIR", help="for the report; runs/parity-RECIPE by default"
    )


def _add_generate(generate: ArgumentParser) -> None:
    add_recipe(generate)
    add_prompts(generate, required=False)
    add_decoding(generate)
    _add_sides(generate, left="a backend and its own settings (jax)")
    generate.add_argument(
        "--from", dest="from_", type=Path, metavar="DIR",
        help="a run's directory, whose newest checkpoint answers on both sides; without it the weights that the recipe starts from",
    )  # fmt: skip
    generate.add_argument(
        "--out", type=directory, metavar="DIR", help="for the report; runs/parity-generate-RECIPE by default"
    )


def _add_sides(command: ArgumentParser, *, left: str) -> None:
    command.add_argument("--left", default="jax", metavar="SIDE", help=left)
    command.add_argument("--right", default="torch", metavar="SIDE", help="the other side (torch)")
    command.add_argument(
        "--precision", choices=get_args(Policy), default="fp64", help="fp64 (the proof) by default"
    )


def _add_diff(compare: ArgumentParser) -> None:
    compare.add_argument("left", type=Path, metavar="TRACE_A")
    compare.add_argument("right", type=Path, metavar="TRACE_B")
    compare.add_argument("--precision", choices=get_args(Policy), help="that of the coarser trace by default")
    compare.add_argument(
        "--out", type=directory, metavar="DIR", help="write verdict.json and report.html here, too"
    )


def _add_matrix(matrix: ArgumentParser) -> None:
    matrix.add_argument("--only", metavar="TEXT", help="only cells whose name contains TEXT, such as /lora/")
    matrix.add_argument(
        "--families", action="store_true", help="the families other than Llama, on their own page"
    )
    matrix.add_argument(
        "--out",
        type=directory,
        default=Path("runs/parity-matrix"),
        metavar="DIR",
        help="for traces and matrix.json",
    )
    matrix.add_argument(
        "--status", type=Path, metavar="FILE",
        help=f"the page to write; {STATUS_PAGE} or {FAMILIES_PAGE} by default, with --only one in DIR",
    )  # fmt: skip


def _add_faults(faults: ArgumentParser) -> None:
    faults.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="NAME", help="only these faults (all)"
    )
    faults.add_argument(
        "--of", choices=("training", "generation"), default="training",
        help="mistakes of training, which parity check must catch (the default), or of generation, which parity generate must",
    )  # fmt: skip
    faults.add_argument("--backend", choices=get_args(Backend), help="plant them in this backend only")
    faults.add_argument(
        "--precision",
        choices=get_args(Policy),
        action="append",
        help="fp64 (the proof) by default; may be repeated",
    )
    faults.add_argument(
        "--keep", action="store_true", help="also keep the traces of faults that came out as expected"
    )
    faults.add_argument("--list", action="store_true", help="list the faults and run nothing")
    faults.add_argument(
        "--page", type=Path, metavar="FILE", help="write the results as Markdown, such as docs/faults.md"
    )
    faults.add_argument(
        "--from", dest="from_", nargs="+", type=Path, metavar="DIR",
        help="with --page: run nothing, and write the page of the results that are kept in these --out directories",
    )  # fmt: skip
    faults.add_argument(
        "--out",
        type=directory,
        default=Path("runs/parity-faults"),
        metavar="DIR",
        help="for traces and faults.json, to which a part of a run adds its results",
    )


_COMMANDS: dict[str, tuple[Callable[[ArgumentParser], None], str]] = {
    "check": (_add_check, "train a recipe on two sides and compare every update"),
    "generate": (_add_generate, "compare what two sides answer to the same prompts"),
    "diff": (_add_diff, "compare two traces, whoever wrote them"),
    "matrix": (_add_matrix, "models, methods, plans and precisions, proven or refused"),
    "faults": (_add_faults, "plant known mistakes; each must be caught at its location"),
}


def _run(args: Namespace) -> int:
    # What --help does without.
    from parity import commands

    return commands.run(args)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a number of updates; give 1 or more")
    return int(text)
