"""The commands of parity: what is run, and what is printed of it."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from parity.check import check
from parity.diff import diff
from parity.faults import SHARED
from parity.faults.results import Result, collected, result_of, store
from parity.faults.run import BACKENDS, chosen, run_faults
from parity.faults.run_decoding import (
    chosen_decoding,
    decoding_lines,
    decoding_listed,
    decoding_page,
    decoding_summary,
    run_decoding_faults,
)
from parity.faults.table import help_summary, listed, listed_shared, page, result_lines, summary
from parity.generate import PromptRequest, compare_responses
from parity.judging.steps import SMALL_STEPS
from parity.matrix.cells import run_matrix, select
from parity.matrix.pages import FAMILIES_PAGE, STATUS_PAGE
from parity.matrix.status import status_lines, write_json, write_status
from parity.report.verdict import Verdict
from parity.runs.plans import refusal, runs_as
from parity.runs.programs import Launcher
from parity.runs.progress import Progress
from parity.runs.sides import Resumption, Side, parse_resumption, parse_side
from trainspec.backends import BACKENDS as CAPABILITIES
from trainspec.errors import EXIT_DONE, EXIT_FAILED, UserError
from trainspec.generation.request import prompt_file, settings
from trainspec.plans.plan import Plan, Policy
from trainspec.runs.run import Run, check_plan
from trainspec.small import RECIPE_FILE, write_small_twin


def run(args: Namespace) -> int:
    """Run one command; the exit code."""
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
        case "generate":
            return _generate(args)
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


def _generate(args: Namespace) -> int:
    asked = PromptRequest(args.prompt, prompt_file(args), settings(args))
    out = args.out or Path("runs") / f"parity-generate-{args.recipe.stem}"
    verdict = compare_responses(
        args.recipe, asked, left=parse_side(args.left),
        right=parse_side(args.right), precision=args.precision, overrides=args.overrides, out=out, start=args.from_,
        launcher=Launcher(Progress()),
    )  # fmt: skip
    print("\n".join(verdict.lines(colour=sys.stdout.isatty())))
    print(f"report: {out / 'report.txt'}")
    return EXIT_DONE if verdict.holds else EXIT_FAILED


def _small(args: Namespace, sides: tuple[Side, Side], directory: Path) -> tuple[Path, tuple[Side, Side]]:
    """The file of the recipe's small twin, and the sides: one that refuses the plan runs on one device. Prints all of it."""
    twin = write_small_twin(args.recipe, args.overrides, directory)
    for side in sides:
        _check_original(side, twin.original)
    print("\n".join([f"small twin of {args.recipe}, in {directory}", *twin.lines()]))
    left, right = (_able(side, twin.recipe.plan, args.precision) for side in sides)
    return directory / RECIPE_FILE, (left, right)


def _check_original(side: Side, run: Run) -> None:
    """Raises PlanError where the plan does not fit the model and the batch at their own sizes, whatever those of the twin are."""
    policy = run.recipe.precision.policy
    if not side.overrides and refusal(run.recipe.plan, policy, side.backend) is None:
        check_plan(run, CAPABILITIES[side.backend])


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
    if args.of == "generation":
        return _faults_of_generation(args)
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


def _faults_of_generation(args: Namespace) -> int:
    faults = chosen_decoding(args.only)
    if args.list:
        print("\n".join(decoding_listed(faults)))
        return EXIT_DONE
    if args.from_ or args.precision not in (None, ["fp64"]):
        raise UserError(
            "--of generation: is run in fp64 and as a whole; leave --from and other precisions out"
        )
    if args.page and (args.only or args.backend):
        raise UserError("--page: a page holds the whole registry; leave --only and --backend out")
    backends = [args.backend] if args.backend else BACKENDS
    outcomes = run_decoding_faults(faults, backends, args.out / "generation")
    if args.page:
        args.page.write_text(decoding_page(outcomes), encoding="utf-8")
    print("\n".join([*decoding_lines(outcomes), decoding_summary(outcomes)]))
    return EXIT_DONE if all(outcome.as_expected for outcome in outcomes) else EXIT_FAILED


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
