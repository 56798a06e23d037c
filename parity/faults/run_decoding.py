"""`parity faults --of generation`: plant each fault of generation in one backend, and have `parity generate`'s judge find it.

Each planted side answers three times: as it is, on whole rows, and one prompt at a time. All of a set-up's rows go to the float64
reference at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parity.comparison.generations import (
    Difference,
    GenerationComparison,
    Pair,
    compare_generations,
    rows_of,
)
from parity.comparison.pair import NAMES
from parity.comparison.rescored import RescoredRow, Row
from parity.faults.decoding import FAULTS, SETUPS, WORDS, DecodingFault, Stage, decoding_recipe
from parity.faults.run import AT_ONCE, BACKENDS
from parity.generate import by_reference, reference_job
from parity.report.markdown import table
from parity.runs.answers import ONE_AT_A_TIME, WITHOUT_CACHE
from parity.runs.fixture import write_tiny
from parity.runs.launch_many import Case, run_cases
from parity.runs.programs import Launcher
from trainspec.cores import cores
from trainspec.errors import UserError, nearest
from trainspec.generation.choice import Sampling
from trainspec.generation.generation import Generation, read_generations
from trainspec.generation.loop import FILE
from trainspec.plans.names import Backend

# How a side answers, by the name of its directory.
LOOKS: dict[str, tuple[str, ...]] = {"as-it-is": (), "whole-rows": WITHOUT_CACHE, "alone": ONE_AT_A_TIME}
# More prompts than a batch holds, of several lengths.
PROMPTS, BATCH, TOKENS = 10, 4, 12
# Of the 320 tokens so many end a response, so that some do: the tokenizer's, and the first letters.
END_TOKENS = (2, *range(60, 76))
CLEAN = ""
Key = tuple[str, str, Backend, str]  # set-up, fault (CLEAN for none), backend, look


@dataclass(frozen=True)
class DecodingOutcome:
    """What the judge says of one fault in one backend; `agrees` of each closer look. `fault` None is a set-up without one."""

    fault: DecodingFault | None
    setup: str
    backend: Backend
    comparison: GenerationComparison | None
    agrees: Mapping[str, bool]
    crash: str | None = None

    @property
    def name(self) -> str:
        """The fault's, or what the clean pair is called."""
        return self.fault.name if self.fault else f"no fault, {self.setup}"

    @property
    def difference(self) -> Difference | None:
        """The first that the judge names."""
        return self.comparison.first_difference if self.comparison else None

    @property
    def side(self) -> str:
        """The name of the planted side."""
        return NAMES[BACKENDS.index(self.backend)]

    @property
    def as_expected(self) -> bool:
        """Whether it was caught at its stage, in its side, and the closer looks say what they must; a clean pair agrees in all."""
        if self.crash or self.comparison is None:
            return False
        if self.fault is None:
            return self.comparison.holds and all(self.agrees.values())
        expected = {"whole-rows": self.fault.without_cache, "alone": self.fault.alone}
        return (
            self.difference is not None
            and stage_of(self.comparison) == self.fault.stage
            and self.side in self.comparison.departing
            and (self.fault.stage == "end" or self.comparison.departing == (self.side,))
            and self.agrees == expected
        )

    @property
    def word(self) -> str:
        """`caught`, `passes` of a clean pair, or what is wrong."""
        if self.crash:
            return "CRASHED"
        if self.as_expected:
            return "caught" if self.fault else "passes"
        if self.fault is None:
            return "FALSE ALARM"
        return "MISSED" if self.difference is None else "MISPLACED"

    def said(self) -> str:
        """The location that the judge names, and what the closer looks add."""
        if self.crash:
            return self.crash
        first = self.difference
        if first is None or self.comparison is None:
            return "no difference"
        where = f"{stage_of(self.comparison)}: prompt {first.prompt + 1}, token {first.position + 1}, {first.what}"
        looks = [f"{look} {'right' if agrees else 'wrong'}" for look, agrees in self.agrees.items()]
        return "; ".join([where, *looks])

    def as_json(self) -> dict[str, Any]:
        """Its entry in faults.json."""
        return {
            "fault": self.name,
            "backend": self.backend,
            "word": self.word,
            "said": self.said(),
            "difference": asdict(self.difference) if self.difference else None,
            "agrees": dict(self.agrees),
            "as_expected": self.as_expected,
        }


def stage_of(comparison: GenerationComparison) -> Stage | str:
    """Where the first difference is, in the words of a fault's `stage`; another word where it is none of those."""
    first = comparison.first_difference
    if first is None:
        return "nowhere"
    if first.kind == "end":
        return "end"
    response = comparison.responses[first.prompt]
    scores_hold = all(gap.holds for gap in response.gaps if gap.position <= first.position)
    if first.kind == "choice" and scores_hold:
        return "draw"
    if first.kind in ("score", "choice"):
        return {0: "first token", 1: "second token"}.get(first.position, f"token {first.position + 1}")
    return first.kind


def chosen_decoding(names: Sequence[str]) -> tuple[DecodingFault, ...]:
    """The faults with these names, or all. Raises UserError with the nearest known name."""
    known = {fault.name: fault for fault in FAULTS}
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: no such fault of generation{nearest(name, known)}")
    return tuple(known[name] for name in dict.fromkeys(names)) or FAULTS


def run_decoding_faults(
    faults: Sequence[DecodingFault], backends: Sequence[Backend], out: Path
) -> list[DecodingOutcome]:
    """Answer everything under `out` and judge it: first the clean pairs, which must agree, then every fault."""
    shutil.rmtree(out, ignore_errors=True)
    tiny = write_tiny(out / "tiny")
    file = {"eos_token_id": END_TOKENS}
    (tiny.model("plain") / "generation_config.json").write_text(json.dumps(file), encoding="utf-8")
    prompts = (tiny.root / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "prompts.jsonl").write_text("".join(prompts[:PROMPTS]), encoding="utf-8")
    setups = list(dict.fromkeys(fault.setup for fault in faults))
    for setup in setups:
        _recipe(out, setup).write_text(decoding_recipe(tiny, setup).to_yaml(), encoding="utf-8")
    planted = {b: [f for f in faults if b in backends and b in f.edits] for b in BACKENDS}
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda b: _answers(b, setups, planted[b], out), BACKENDS))
    answers = made[0] | made[1]
    found = {setup: _comparisons(setup, answers, out) for setup in setups}
    outcomes = [_outcome(None, setup, BACKENDS[1], answers, found[setup]) for setup in setups]
    outcomes += [
        _outcome(fault, fault.setup, b, answers, found[fault.setup])
        for fault in faults
        for b in BACKENDS
        if fault in planted[b]
    ]
    entries = [outcome.as_json() for outcome in outcomes]
    (out / "faults.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    return outcomes


def _recipe(out: Path, setup: str) -> Path:
    return out / f"{setup}.yaml"


def _answers(
    backend: Backend, setups: Sequence[str], faults: Sequence[DecodingFault], out: Path
) -> dict[Key, list[Generation] | str]:
    """What a backend answers in every set-up without a fault, and with each fault, in each look; the error of what failed."""
    wanted: list[tuple[str, DecodingFault | None]] = [*((setup, None) for setup in setups)]
    wanted += [(fault.setup, fault) for fault in faults]
    keys, cases = [], []
    for setup, fault in wanted:
        for look, words in LOOKS.items():
            name = fault.name if fault else CLEAN
            keys.append((setup, name, backend, look))
            edits = fault.edits[backend] if fault else ()
            home = _home(out, keys[-1])
            argv = ["generate", str(_recipe(out, setup)), "--out", str(home), "--scores", "--untrained"]
            argv += ["--file", str(out / "prompts.jsonl"), "--max-tokens", str(TOKENS), "--batch", str(BATCH)]
            cases.append(Case((*argv, *WORDS.get(setup, ()), *words), 1, edits))
    results = run_cases(backend, cases, home=out / "launches", at_once=min(AT_ONCE, cores()))
    return {
        key: result.wrong or read_generations(_home(out, key) / FILE)
        for key, result in zip(keys, results, strict=True)
    }


def _home(out: Path, key: Key) -> Path:
    setup, fault, backend, look = key
    return out / backend / (fault or f"clean-{setup}") / look


def _comparisons(
    setup: str, answers: Mapping[Key, list[Generation] | str], out: Path
) -> dict[Key, GenerationComparison]:
    """Every answer of a set-up against the other backend's clean one, by its key."""
    pairs: dict[Key, list[Pair]] = {}
    for key, mine in answers.items():
        other = answers[setup, CLEAN, _other(key[2]), "as-it-is"] if key[0] == setup else ""
        if not isinstance(mine, str) and not isinstance(other, str) and len(mine) == len(other):
            sides = [mine, other] if key[2] == BACKENDS[0] else [other, mine]
            pairs[key] = list(zip(*sides, strict=True))
    rows = [row for some in pairs.values() for row in rows_of(some)]
    found = iter(_rescored(setup, rows, out) if rows else ())
    sampling = _sampling(setup)
    return {
        key: compare_generations(some, [next(found) for _ in some], precision="fp64", sampling=sampling)
        for key, some in pairs.items()
    }


def _rescored(setup: str, rows: list[Row], out: Path) -> list[RescoredRow]:
    job = reference_job(_recipe(out, setup), (), "fp64", rows, out / f"reference-{setup}")
    return by_reference(job, Launcher())


def _sampling(setup: str) -> Sampling:
    """That of a set-up's command line."""
    words = iter(WORDS.get(setup, ()))
    settings = {word.removeprefix("--"): next(words) for word in words}
    return Sampling(float(settings.get("temperature", 0.0)), seed=int(settings.get("seed", 0)))


def _other(backend: Backend) -> Backend:
    return next(b for b in BACKENDS if b != backend)


def _outcome(
    fault: DecodingFault | None,
    setup: str,
    backend: Backend,
    answers: Mapping[Key, list[Generation] | str],
    found: Mapping[Key, GenerationComparison],
) -> DecodingOutcome:
    name = fault.name if fault else CLEAN
    keys: dict[str, Key] = {look: (setup, name, backend, look) for look in LOOKS}
    others: Key = (setup, CLEAN, _other(backend), "as-it-is")
    said = [*(answers[key] for key in keys.values()), answers[others]]
    crash = next((each for each in said if isinstance(each, str)), None)
    if crash is None and any(key not in found for key in keys.values()):
        crash = "other prompts were answered"
    if crash:
        return DecodingOutcome(fault, setup, backend, None, {}, crash)
    agrees = {look: found[key].holds for look, key in keys.items() if look != "as-it-is"}
    return DecodingOutcome(fault, setup, backend, found[keys["as-it-is"]], agrees)


PAGE_HEAD = """# Faults of generation that must be caught

Written by `parity faults --of generation --page docs/faults-of-generation.md` from its results. Each fault is planted in one backend, as
an edit of its source while it is loaded, and its responses are compared with the other backend's in fp64, as `parity generate`
does. The judge must name the side, and the token where the fault shows first: the *first token*, which the pass over the prompts
gives; the *second token*, the first that is decoded; a *draw* from log-probabilities that are right; or the *end* of a response. Two
closer looks must say as expected whether the planted side is right on *whole rows* (`--no-cache`) and with each prompt *alone*
(`--batch 1`). The clean pairs agree in all three.
"""


def decoding_lines(outcomes: Sequence[DecodingOutcome]) -> Iterator[str]:
    """A line for each outcome."""
    width = max(len(outcome.name) for outcome in outcomes)
    for outcome in outcomes:
        backend = outcome.backend if outcome.fault else "both"
        line = f"{outcome.word:<11} fp64 {backend:<6} {outcome.name:<{width}}  {outcome.said()}"
        yield (
            line
            if outcome.as_expected or outcome.fault is None
            else f"{line}; expected: {outcome.fault.stage}"
        )


def decoding_summary(outcomes: Sequence[DecodingOutcome]) -> str:
    """How many are as expected, in words."""
    words = [outcome.word for outcome in outcomes]
    caught, passed = words.count("caught"), words.count("passes")
    others = len(words) - caught - passed
    return f"{caught} caught at the right token, {passed} clean pairs pass, {others} not as expected"


def decoding_page(outcomes: Sequence[DecodingOutcome]) -> str:
    """The results as a Markdown page."""
    rows = [(o.name, o.backend if o.fault else "both", o.word, o.said()) for o in outcomes]
    about = [(f.name, f.imitates, f.source, f.stage, f.setup) for f in FAULTS]
    lines = [PAGE_HEAD, f"{decoding_summary(outcomes)}.", ""]
    lines += [*table(("fault", "backend", "result", "location named"), rows), ""]
    lines += [
        "## What they imitate",
        "",
        *table(("fault", "imitates", "source", "shows at", "set-up"), about),
        "",
    ]
    lines += ["## Set-ups", "", *(f"- `{n}`: {words}." for n, words in SETUPS.items())]
    return "\n".join(lines) + "\n"


def decoding_listed(faults: Sequence[DecodingFault]) -> Iterator[str]:
    """The lines of `parity faults --of generation --list`."""
    for fault in faults:
        yield f"{fault.name}: {fault.imitates}"
        yield f"    source: {fault.source}"
        yield f"    shows:  {fault.stage}; set-up {fault.setup} ({SETUPS[fault.setup]})"
