"""`parity check|diff|matrix|faults`: the command line."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import assert_never, get_args

from parity.check import DEFAULT_STEPS, check
from parity.diff import diff
from parity.faults import SHARED
from parity.faults.results import Result, collected, result_of, store
from parity.faults.run import BACKENDS, chosen, run_faults
from parity.faults.table import help_summary, listed, listed_shared, page, result_lines, summary
from parity.matrix.cells import run_matrix, select
from parity.matrix.status import status_lines, write_json, write_status
from parity.report.verdict import Verdict
from parity.runs.devices import DEVICES
from parity.runs.plans import refusal, runs_as
from parity.runs.progress import Progress
from parity.runs.sides import Resumption, Side, parse_resumption, parse_side
from trainspec.command import add_recipe, run_command
from trainspec.errors import EXIT_DONE, EXIT_FAILED, UserError
from trainspec.plans.plan import Plan, Policy
from trainspec.small import RECIPE_FILE, write_small_twin

# Updates of a small twin that are compared where the user does not say.
SMALL_STEPS = 4
STATUS_PAGE, FAMILIES_PAGE = Path("docs/parity-status.md"), Path("docs/parity-status-families.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 (pass), 1 (fail) or 2 (the user's mistake)."""
    return run_command(_run, parser(), argv)


def parser() -> ArgumentParser:
    """The command line's arguments."""
    parser = ArgumentParser(prog="parity", description="Prove that two runs did the same training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("check", help="train a recipe on two sides and compare every update")
    add_recipe(run)
    run.add_argument(
        "--left",
        default="jax",
        metavar="SIDE",
        help='a backend and its own settings, such as "jax plan.data=2" or jax@gpu (jax)',
    )
    run.add_argument("--right", default="torch", metavar="SIDE", help="the other side (torch)")
    run.add_argument(
        "--precision", choices=get_args(Policy), default="fp64", help="fp64 (the proof) by default"
    )
    run.add_argument(
        "--steps", type=_count, metavar="N", help=f"how many updates to compare ({DEFAULT_STEPS})"
    )
    run.add_argument(
        "--resume-at", metavar="[SIDE:]N",
        help="train both sides, or left:N or right:N alone, up to step N, then --resume to the end",
    )  # fmt: skip
    run.add_argument(
        "--continue-from", choices=("own", "other"), default="own",
        help="with --resume-at left:N or right:N: from its own checkpoint (the default), or the other side's",
    )  # fmt: skip
    run.add_argument(
        "--small", action="store_true",
        help="prove a small twin of the recipe: the same family, flags, method, data and plan axes, small sizes",
    )  # fmt: skip
    run.add_argument(
        "--device", choices=DEVICES, default="cpu",
        help="where both sides and the float64 reference compute, one after the other: on the cores (cpu, the default), or on what "
        "is there (auto); a side may name its own, such as --right torch@cpu",
    )  # fmt: skip
    run.add_argument("--out", type=Path, metavar="DIR", help="for the report; runs/parity-RECIPE by default")
    compare = commands.add_parser("diff", help="compare two traces, whoever wrote them")
    compare.add_argument("left", type=Path, metavar="TRACE_A")
    compare.add_argument("right", type=Path, metavar="TRACE_B")
    compare.add_argument("--precision", choices=get_args(Policy), help="that of the coarser trace by default")
    compare.add_argument(
        "--out", type=Path, metavar="DIR", help="write verdict.json and report.html here, too"
    )
    matrix = commands.add_parser("matrix", help="models, methods, plans and precisions, proven or refused")
    matrix.add_argument("--only", metavar="TEXT", help="only cells whose name contains TEXT, such as /lora/")
    matrix.add_argument(
        "--families", action="store_true", help="the families other than Llama, on their own page"
    )
    matrix.add_argument(
        "--out",
        type=Path,
        default=Path("runs/parity-matrix"),
        metavar="DIR",
        help="for traces and matrix.json",
    )
    matrix.add_argument(
        "--status", type=Path, metavar="FILE",
        help=f"the page to write; {STATUS_PAGE} or {FAMILIES_PAGE} by default, with --only one in DIR",
    )  # fmt: skip
    faults = commands.add_parser("faults", help="plant known mistakes; each must be caught at its location")
    faults.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="NAME", help="only these faults (all)"
    )
    faults.add_argument("--backend", choices=BACKENDS, help="plant them in this backend only")
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
        type=Path,
        default=Path("runs/parity-faults"),
        metavar="DIR",
        help="for traces and faults.json, to which a part of a run adds its results",
    )
    return parser


def _run(args: Namespace) -> int:
    match args.command:
        case "check":
            out = args.out or Path("runs") / f"parity-{args.recipe.stem}{'-small' if args.small else ''}"
            recipe, overrides, steps = args.recipe, args.overrides, args.steps
            sides = parse_side(args.left), parse_side(args.right)
            if args.small:
                recipe, sides = _small(args, sides, out / "small")
                overrides, steps = (), steps or SMALL_STEPS
            left, right = sides
            verdict = check(
                recipe, left=left, right=right, precision=args.precision,
                steps=steps, overrides=overrides, out=out, device=args.device, resumption=_resumption(args),
                watcher=Progress(),
            )  # fmt: skip
        case "diff":
            out = args.out
            verdict = diff(args.left, args.right, precision=args.precision, out=out)
        case "matrix":
            return _matrix(args)
        case "faults":
            return _faults(args)
        case other:
            assert_never(other)
    return _tell(verdict, out)


def _small(args: Namespace, sides: tuple[Side, Side], directory: Path) -> tuple[Path, tuple[Side, Side]]:
    """The file of the recipe's small twin, and the sides: one that refuses the plan runs on one device. Prints all of it."""
    twin = write_small_twin(args.recipe, args.overrides, directory)
    print("\n".join([f"small twin of {args.recipe}, in {directory}", *twin.lines()]))
    left, right = (_able(side, twin.recipe.plan, args.precision) for side in sides)
    return directory / RECIPE_FILE, (left, right)


def _able(side: Side, plan: Plan, precision: Policy) -> Side:
    """The side with its plan replaced by one device if its backend refuses the plan that the recipe names."""
    why = None if side.overrides else refusal(plan, precision, side.backend)
    if why is None:
        return side
    print(f"{side} on one device: {why}")
    alone = runs_as(plan, precision, side.backend)
    changed = {name: value for name, value in alone if value != getattr(plan, name)}
    return replace(side, overrides=tuple(f"plan.{name}={value}" for name, value in changed.items()))


def _resumption(args: Namespace) -> Resumption | None:
    from_other = args.continue_from == "other"
    if args.resume_at is None:
        if from_other:
            raise UserError("--continue-from other: says where a resume continues; give --resume-at as well")
        return None
    return parse_resumption(args.resume_at, from_other=from_other)


def _matrix(args: Namespace) -> int:
    results = run_matrix(select(args.only, families=args.families), out=args.out)
    usual = FAMILIES_PAGE if args.families else STATUS_PAGE
    page = args.status or (args.out / usual.name if args.only else usual)
    write_json(args.out / "matrix.json", results)
    write_status(page, results)
    print("\n".join(status_lines(results)))
    print(f"page: {page}")
    return EXIT_FAILED if any(result.verdict == "fail" for result in results) else EXIT_DONE


def _faults(args: Namespace) -> int:
    faults = chosen(args.only)
    if args.list:
        print("\n".join([*listed(faults), *listed_shared(() if args.only else SHARED)]))
        return EXIT_DONE
    if args.page and (args.only or args.backend):
        raise UserError("--page: a page holds the whole registry; leave --only and --backend out")
    if args.from_:
        if not args.page:
            raise UserError("--from: says of which results a page is written; give --page FILE as well")
        results = collected(args.from_)
        args.page.write_text(page(results), encoding="utf-8")
        return _count_up(results)
    backends, outcomes = [args.backend] if args.backend else BACKENDS, []
    precisions: Sequence[Policy] = list(dict.fromkeys(args.precision or ["fp64"]))
    for precision in precisions:
        made = run_faults(faults, backends, args.out / precision, precision=precision, keep=args.keep)
        store(args.out, made)  # what comes next may be stopped
        outcomes += made
    results = [result_of(outcome) for outcome in outcomes]
    if args.page:
        args.page.write_text(page(results), encoding="utf-8")
    print("\n".join(result_lines(outcomes)))
    return _count_up(results)


def _count_up(results: Sequence[Result]) -> int:
    print(summary(results))
    if helped := help_summary(results):
        print(helped)
    return EXIT_DONE if all(result.is_expected for result in results) else EXIT_FAILED


def _tell(verdict: Verdict, out: Path | None) -> int:
    print("\n".join(verdict.lines(colour=sys.stdout.isatty())))
    if out:
        print(f"report: {out / 'report.html'}")
    return EXIT_DONE if verdict.holds else EXIT_FAILED


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a number of updates; give 1 or more")
    return int(text)
