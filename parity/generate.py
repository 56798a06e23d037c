"""`parity generate`: both backends answer the same prompts, and the float64 reference says what rounding explains."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from parity.comparison.generations import (
    GenerationComparison,
    Pair,
    compare_generations,
    rows_of,
)
from parity.comparison.pair import NAMES
from parity.comparison.rescored import RescoredRow, Row
from parity.comparison.tolerance import UNIT
from parity.report.generations import CloserLook, GenerationVerdict
from parity.runs.answers import ONE_AT_A_TIME, WITHOUT_CACHE, Answers
from parity.runs.devices import REFERENCE_BACKEND
from parity.runs.plans import refusal
from parity.runs.programs import Launcher
from parity.runs.rescore import RescoreJob, read_rescored
from parity.runs.responses import SideGeneration, count_records, link_newest, newest_of, write_own_prompts
from parity.runs.roundings import DRAWS
from parity.runs.sides import Side, as_options, precision_settings
from parity.runs.work import REFERENCE, fit_at_once, size_of
from trainspec.checkpoints.checkpoint import read_origin
from trainspec.checkpoints.resume import check_loadable
from trainspec.errors import EXIT_DONE, UserError
from trainspec.generation.generation import Generation
from trainspec.generation.request import Settings
from trainspec.plans.names import Policy
from trainspec.plans.plan import COMPUTE_DTYPE
from trainspec.recipe import load_recipe
from trainspec.runs.run import resolve
from trainspec.text.store import find_tokenizer


@dataclass(frozen=True)
class PromptRequest:
    """What is asked: a text or the records of a `file`, or the recipe's own data; `settings` say how responses are made."""

    prompt: str | None
    file: Path | None
    settings: Settings

    def words(self, file: Path | None) -> list[str]:
        """The options of `generate` that ask it; `file` stands for the recipe's own data."""
        records = self.file or file
        # With "=", as a text may begin with a dash.
        prompts = [f"--prompt={self.prompt or ''}"] if records is None else [f"--file={records}"]
        return [*prompts, *self.how]

    @property
    def how(self) -> list[str]:
        """The options that say how responses are made."""
        settings, usual = self.settings, Settings()
        values = {name: getattr(settings, name) for name in ("max_tokens", "batch")} | vars(settings.sampling)
        words = []
        for name, value in values.items():
            if value != getattr(usual, name, getattr(usual.sampling, name, None)):
                words += [f"--{name.replace('_', '-')}", str(value)]
        words += [f"--stop={text}" for text in settings.stop]
        return words if settings.caches else [*words, "--no-cache"]


def compare_responses(
    recipe_path: Path,
    asked: PromptRequest,
    *,
    left: Side,
    right: Side,
    precision: Policy,
    overrides: Sequence[str],
    out: Path,
    start: Path | None = None,
    launcher: Launcher | None = None,
) -> GenerationVerdict:
    """Have both sides answer, and judge their tokens. Writes `out`/generate.json and report.txt.

    `start` is the directory of a run whose newest checkpoint both load; without it the recipe's starting weights answer. Where a
    side differs by more than rounding it answers again without a cache, and one prompt at a time. Raises UserError for a mistake
    in the arguments, the recipe or the prompts.
    """
    recipe = load_recipe(recipe_path, overrides)
    is_single, saved = True, newest_of(start) if start else None
    for name, side in zip(NAMES, (left, right), strict=True):
        if side.device not in (None, "cpu"):
            raise UserError(
                f"--{name} {shlex.quote(str(side))}: responses are compared on the cores; leave @ out"
            )
        of_side = load_recipe(recipe_path, (*overrides, *side.overrides))
        plan = of_side.plan
        is_single = is_single and plan.devices == 1
        if line := refusal(plan, precision, side.backend):
            raise UserError(f"{name} ({side}): {line}")
        if saved:
            check_loadable(read_origin(saved), resolve(of_side))
    if (out / "checkpoints").exists() or (out / "recipe.yaml").exists():
        raise UserError(f"--out {out}: holds a training run; give the comparison its own directory")
    if start is not None:
        shutil.rmtree(out / "start", ignore_errors=True)
        link_newest(start, out / "start")
    file, source = None, "--prompt" if asked.file is None else str(asked.file)
    if asked.prompt is None and asked.file is None:
        file, source = write_own_prompts(recipe.data, out)
    launcher = launcher or Launcher()
    request = _Request(
        recipe_path, tuple(overrides), precision, (left, right), asked, file, out,
        out / "start" if start else None, is_single and fit_at_once(size_of(resolve(recipe)), precision, programs=2),
        launcher,
    )  # fmt: skip
    try:
        pairs, comparison = request.judged(out)
        looks = () if comparison.holds else request.closer(pairs, comparison)
    finally:
        launcher.watcher.finished()
    verdict = GenerationVerdict(
        precision, (str(left), str(right)), source, pairs, comparison, looks,
        request.texts(comparison), request.arguments(start),
    )  # fmt: skip
    verdict.write(out)
    return verdict


@dataclass(frozen=True)
class _Request:
    """The arguments of a comparison. `file` has the prompts of the recipe's own data, `start` a link to the checkpoint."""

    recipe: Path
    overrides: tuple[str, ...]
    precision: Policy
    sides: tuple[Side, Side]
    asked: PromptRequest
    file: Path | None
    out: Path
    start: Path | None
    at_once: bool
    launcher: Launcher

    def arguments(self, start: Path | None) -> list[str]:
        """Those of the command line that ask for the same, but for the precision."""
        words = [str(self.recipe), *as_options(self.overrides)]
        words += ["--left", str(self.sides[0]), "--right", str(self.sides[1])]
        words += ["--from", str(start)] if start else []
        return [*words, *(self.asked.how if self.file else self.asked.words(None))]

    def judged(
        self, out: Path, *, kept: Sequence[list[Generation] | None] = (None, None), more: Sequence[str] = ()
    ) -> tuple[list[Pair], GenerationComparison]:
        """Both sides' responses, compared; those `kept` of an earlier look are not made again. `more` options come last."""
        self.launcher.watcher.planned(self._planned(kept, tuple(more)))
        said = self._said(out, kept, more)
        left, right = said
        if len(left) != len(right):
            raise UserError(
                f"left has {len(left)} responses, right {len(right)}: both must answer all prompts"
            )
        pairs = list(zip(left, right, strict=True))
        job = reference_job(
            self.recipe, self.overrides, self.precision, rows_of(pairs), out / "reference", start=self.start
        )
        found = by_reference(job, self.launcher)
        self.launcher.watcher.comparing()
        sampling = self.asked.settings.sampling
        return pairs, compare_generations(pairs, found, precision=self.precision, sampling=sampling)

    def _planned(self, kept: Sequence[list[Generation] | None], more: tuple[str, ...]) -> Answers:
        """What is about to run."""
        again = [
            (name, str(side))
            for side, name, before in zip(self.sides, NAMES, kept, strict=True)
            if before is None
        ]
        records = self.asked.file or self.file
        prompts = count_records(records) if records else 1
        draws = _draws(self.precision)
        return Answers(
            str(self.recipe), again, prompts, self.asked.settings.max_tokens, self.precision, draws, self.at_once,
            more or None,
        )  # fmt: skip

    def _said(
        self, out: Path, kept: Sequence[list[Generation] | None], more: Sequence[str]
    ) -> list[list[Generation]]:
        words = [*self.asked.words(self.file), *more]
        tasks = [
            partial(list, before)
            if before is not None
            else SideGeneration(
                side, name, self.recipe, self.overrides, self.precision, words, out, self.start, self.launcher
            ).run
            for side, name, before in zip(self.sides, NAMES, kept, strict=True)
        ]
        return self.launcher.at_once(tasks) if self.at_once else [task() for task in tasks]

    def closer(self, pairs: Sequence[Pair], first: GenerationComparison) -> tuple[CloserLook, ...]:
        """The departing sides once more: on whole rows, and one prompt at a time."""
        settings = self.asked.settings
        options = [WITHOUT_CACHE] if settings.caches else []
        options += [ONE_AT_A_TIME] if min(settings.batch, len(pairs)) > 1 else []
        kept = [
            None if name in first.departing else [pair[at] for pair in pairs] for at, name in enumerate(NAMES)
        ]
        looks = []
        for option in options:
            home = self.out / "closer" / option[0].strip("-")
            _, comparison = self.judged(home, kept=kept, more=option)
            looks.append(CloserLook(option, first.departing, comparison.first_difference))
        return tuple(looks)

    def texts(self, comparison: GenerationComparison) -> dict[int, str]:
        """The vocabulary's words for the tokens at which the sides part, and for their rivals."""
        ids = sorted(
            {
                i
                for p in comparison.partings
                for c in p.next_tokens
                for i in (c.token, c.rival)
                if i is not None
            }
        )
        if not ids:
            return {}
        run = resolve(load_recipe(self.recipe, self.overrides))
        tokenizer = find_tokenizer(run.recipe.data, run.directory, run.recipe.model.from_)
        return {
            i: pieces[0] for i, (pieces, _) in zip(ids, tokenizer.pieces([[i] for i in ids]), strict=True)
        }


def reference_job(
    recipe: Path,
    overrides: Sequence[str],
    precision: Policy,
    rows: list[Row],
    out: Path,
    *,
    start: Path | None = None,
) -> RescoreJob:
    """What the reference is to do: rows of the recipe's model in float64, with the draws of the precision."""
    # A fused kernel is held to the definition.
    exact = [*overrides, *precision_settings("fp64"), "plan.attention=reference"]
    return RescoreJob(
        REFERENCE_BACKEND, str(recipe), exact, str(start) if start else None, COMPUTE_DTYPE[precision],
        (UNIT[precision], UNIT["fp32"], UNIT["fp32"]), _draws(precision), rows, str(out),
    )  # fmt: skip


def _draws(precision: Policy) -> int:
    """How often the reference goes through every response again, with roundings."""
    return 0 if precision == "fp64" else DRAWS[precision]


def by_reference(job: RescoreJob, launcher: Launcher) -> list[RescoredRow]:
    """What the reference says of the job's rows. Raises UserError if it fails."""
    home = Path(job.out)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    file, log = home / "job.json", home / "log.txt"
    file.write_text(json.dumps(asdict(job)) + "\n", encoding="utf-8")
    code, last = launcher.run(REFERENCE, [sys.executable, "-m", "parity.runs.rescore", str(file)], log=log)
    if code != EXIT_DONE:
        raise UserError(f"the fp64 reference ({REFERENCE_BACKEND}): {last}; the whole log is {log}")
    return read_rescored(home, len(job.rows))
