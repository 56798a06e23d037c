"""How much of its bounds a clean run uses: checks of runs without a fault, over models, methods, data and seeds.

    python benchmarks/false_alarms.py --seed 1 --precision fp32 [--groups 5] [--each 12] [--purpose find|test] [--out DIR]
    python benchmarks/false_alarms.py --page docs/false-alarms.md [--out DIR]

A case is a check of a few updates (`parity.judging.many`), and one that fails is a false alarm. The cases of a group have one shape: a kind
of model, a method, a length, an accumulation and a seed, so that all of them use the same programs. They differ in the model's
weights, those of `scripts/make_demo_model.py` after 0 to 200 steps (after 40, attention is still nearly uniform: there
rounding is amplified the most), and in how rows are filled. Every case is judged a second time with thirty times its rounding,
which must fail. One with gradients that are not provable is judged a third time, with those weights' gradients a fifth too large on the right
in all layers and steps, as one mistake of their code makes them: each of those weights must fail. A seed draws the cases: seeds whose cases were looked at while bounds were chosen are run with `--purpose find`,
others test them. A seed has one purpose, whatever the precision and the code; once a test has failed and its bounds are mended,
other seeds test them.

Every case's result is appended to DIR/results.jsonl with the digest of the code that made it, and a case that is there is not run
again by the same code. The page keeps results of different code apart. The traces of a case that fails are kept. Exit code 1
after a false alarm, or where one of these controls passes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import runpy
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from false_alarms_page import KEYS, SHOWN, Record, largest, number, page
from numpy.typing import NDArray

from parity.comparison.compare import Comparison, Finding, compare
from parity.comparison.pair import Pair
from parity.comparison.phases import Location
from parity.comparison.tolerance import Bounds, CheckedPair
from parity.faults.results import sources
from parity.judging.many import CheckRequest, RunPair, make_runs
from parity.runs.fixture import METHODS
from parity.runs.sides import Side
from trainspec.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, UserError

ROOT = Path(__file__).parent.parent
MODEL_SCRIPT = ROOT / "scripts/make_demo_model.py"
TRAINED_STEPS = (0, 10, 20, 40, 100, 200)
SMALL = ("--hidden", "64")
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": SMALL,
    "tied": (*SMALL, "--tied"),
    "bias": (*SMALL, "--bias"),
    "llama3": (*SMALL, "--rope", "llama3"),
    "one-layer": (*SMALL, "--layers", "1"),
    "demo-size": (),
}
# Full training has the most tensors, so one group of each seed and precision is of it.
OTHERS = tuple(name for name in METHODS if name != "full")
LENGTHS = (32, 64, 96, 160)
# Texts are longer than most rows, so what is padded are questions and answers.
FILLED = ("packed", "questions-padded-right", "questions-padded-left", "chinese")
CHINESE = (
    "今天天气很好，我们去公园散步。",
    "机器翻译把一种语言的文字转换成另一种语言。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？",
)
# The first moves the weights, the second is made from moved ones.
STEPS = 2
TIMES = 30.0
# Phases of many numbers: the worst of them shows thirty times the rounding. One number may be right by chance.
MUST_FAIL = ("gradient", "moment1", "moment2", "update")
# A gradient's factor in the control of what is not provable.
TOO_LARGE = 1.2
# Cases of one launch.
BATCH = 24
Low = Literal["fp32", "bf16"]
POLICIES: tuple[Low, Low] = ("fp32", "bf16")


@dataclass(frozen=True)
class Case:
    """A recipe without a fault."""

    trained: int
    filled: str
    variant: str
    method: str
    tokens: int
    accumulation: int
    reduce: Low
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.method}, {self.variant} after {self.trained} steps, {self.tokens} tokens {self.filled}, "
            f"accumulation {self.accumulation}, summed in {self.reduce}, seed {self.seed}"
        )


@dataclass(frozen=True)
class Control:
    """Bounds that are told of other errors than were made, and otherwise say what `bounds` do."""

    bounds: Bounds

    @property
    def notes(self) -> Sequence[str]:
        """None of its own."""
        return ()

    def incomparable(self, location: Location, left: NDArray[Any], right: NDArray[Any]) -> str | None:
        """As the bounds say."""
        return self.bounds.incomparable(location, left, right)


@dataclass(frozen=True)
class Amplified(Control):
    """They are told of `times` the errors that were made."""

    times: float

    def checked_pairs(self, location: Location, left: NDArray[Any], right: NDArray[Any]) -> list[CheckedPair]:
        """The bounds' pairs, further apart."""
        return [
            replace(pair, first=pair.second + self.times * (pair.first - pair.second))
            for pair in self.bounds.checked_pairs(location, left, right)
        ]


@dataclass(frozen=True)
class Mistake(Control):
    """They are told of gradients `TOO_LARGE` times the right side's, of every weight that `is_mistaken`."""

    is_mistaken: Callable[[str], bool]

    def checked_pairs(
        self, location: Location, left: NDArray[Any], right: NDArray[Any]
    ) -> Iterable[CheckedPair]:
        """The bounds' pairs of such gradients."""
        if location.phase == "gradient" and self.is_mistaken(location.tensor):
            right = TOO_LARGE * right
        return self.bounds.checked_pairs(location, left, right)


def main() -> int:
    """Draw the cases, check those that were not, and print what they use; or write the page. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--precision", choices=POLICIES, default="fp32")
    parser.add_argument("--groups", type=int, default=5)
    parser.add_argument("--each", type=int, default=12, help="cases of a group")
    parser.add_argument("--purpose", choices=("find", "test"), default="test")
    parser.add_argument("--out", type=Path, default=ROOT / "build/false-alarms")
    parser.add_argument(
        "--page", type=Path, help="write this page from the results in --out, and run nothing"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    try:
        if arguments.page:
            arguments.page.write_text(page(read(out), sources()), encoding="utf-8")
            return EXIT_DONE
        return run(arguments, out)
    except UserError as error:
        print(f"false_alarms: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def run(arguments: argparse.Namespace, out: Path) -> int:
    """Draw the cases, check those that were not, and print what they use."""
    if min(arguments.groups, arguments.each) < 1:
        raise UserError("--groups and --each: at least 1")
    asked: Record = {
        "sources": sources(),
        "purpose": arguments.purpose,
        "precision": arguments.precision,
        "drawn_by": arguments.seed,
        "updates": STEPS,
    }
    before = read(out)
    if any(r["drawn_by"] == asked["drawn_by"] and r["purpose"] != asked["purpose"] for r in before):
        raise UserError(
            f"--seed {arguments.seed} --purpose {arguments.purpose}: the seed has the other purpose in {out}; choose another seed"
        )
    out.mkdir(parents=True, exist_ok=True)
    groups = drawn(arguments.groups, arguments.each, arguments.seed, arguments.precision)
    known = {record["name"] for record in before if asked.items() <= record.items()}
    missing = [left for group in groups if (left := [case for case in group if str(case) not in known])]
    for batch in batches(missing):
        for record in checked(batch, arguments.precision, out):
            with (out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asked | record) + "\n")
            print("\n".join(lines(record)), flush=True)
    records = [record for record in read(out) if asked.items() <= record.items()]
    print("\n".join(summary(records)))
    good = all(r["verdict"] == "pass" and not r["control_passes"] and not r["hidden"] for r in records)
    return EXIT_DONE if good else EXIT_FAILED


def drawn(groups: int, each: int, seed: int, precision: Low) -> list[list[Case]]:
    """Cases in which the values of every property come equally often, paired at random.

    The groups of the two precisions go on through one deck: what one of them does not have comes in the other.
    """
    shared, random = np.random.default_rng(seed), np.random.default_rng([seed, POLICIES.index(precision)])

    def dealt(values: Sequence[Any], count: int, order: np.random.Generator) -> list[Any]:
        rounds = [order.permutation(len(values)) for _ in range(-(-count // len(values)))]
        return [values[i] for i in chain(*rounds)][:count]

    def of_precision(values: Sequence[Any], count: int = groups) -> list[Any]:
        start = count * POLICIES.index(precision)
        return dealt(values, 2 * count, shared)[start : start + count]

    shapes = zip(
        of_precision(tuple(VARIANTS)),
        ["full", *of_precision(OTHERS, groups - 1)],
        of_precision(LENGTHS),
        of_precision((1, 2)),
        dealt(("fp32", precision), groups, random),
        [int(random.integers(1000)) for _ in range(groups)],
        strict=True,
    )
    # One deck of all weights and fillings, so that few groups have two alike; those are left out.
    contents = iter(dealt(tuple(product(TRAINED_STEPS, FILLED)), groups * each, random))
    return [list(dict.fromkeys(Case(*next(contents), *shape) for _ in range(each))) for shape in shapes]


def batches(groups: Sequence[list[Case]]) -> Iterator[list[list[Case]]]:
    """Groups of some `BATCH` cases together."""
    batch: list[list[Case]] = []
    for group in groups:
        batch.append(group)
        if sum(map(len, batch)) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def checked(groups: Sequence[Sequence[Case]], precision: Low, out: Path) -> Iterator[Record]:
    """The record of every case; its traces go under `out`, and stay there if it fails."""
    make_models({(case.variant, case.trained) for group in groups for case in group}, out)
    cases = [case for group in groups for case in group]
    asked = [
        [
            CheckRequest(ROOT / "configs/full.yaml", settings(case, precision, out), home(case, out))
            for case in group
        ]
        for group in groups
    ]
    made = make_runs(
        asked, sides=(Side("jax"), Side("torch")), precision=precision, steps=STEPS, home=out / "launches"
    )
    for case, runs in zip(cases, made, strict=True):
        record = {"name": str(case), "case": asdict(case), **judged(runs)}
        if record["verdict"] == "pass":
            shutil.rmtree(home(case, out))
        yield record


def judged(runs: RunPair) -> Record:
    """What a case uses of its bounds, and what it would use with thirty times its rounding."""
    comparison = runs.judged()
    first = comparison.first_divergence
    said = (first.reason or f"{first.used:.3g} of the bound") if first else None
    control = times_thirty(runs)
    over = {finding.location.phase for finding in control.findings if is_over(finding)}
    return {
        "verdict": "pass" if comparison.holds else "fail",
        "first": f"{first.location}: {said}" if first else None,
        "used": shares(comparison),
        "undetermined": comparison.undetermined,
        "unproven": len(comparison.unproven),
        "examined": len(comparison.examined),
        "times_30": shares(control),
        "control_passes": [phase for phase in MUST_FAIL if phase not in over],
        "hidden": hidden(runs, comparison),
    }


def times_thirty(runs: RunPair) -> Comparison:
    """The case with thirty times its rounding, as the same bounds judge it."""
    pair = traces(runs)
    return compare(pair, Amplified(runs.bounds(pair), TIMES))


def is_over(finding: Finding) -> bool:
    """Whether it is over its bound; "nothing is proven" is a failure, and no difference that was found."""
    return finding.error is not None and not finding.holds


def hidden(runs: RunPair, comparison: Comparison) -> list[str]:
    """The weights, layers left open, of which a gradient is not provable and a mistake in all of them passes."""
    if not comparison.unproven:
        return []
    pair = traces(runs)
    unproven = {pair.structure.in_any_layer(finding.location.tensor) for finding in comparison.unproven}
    judged = compare(
        pair, Mistake(runs.bounds(pair), lambda name: pair.structure.in_any_layer(name) in unproven)
    )
    found = {
        pair.structure.in_any_layer(finding.location.tensor)
        for finding in judged.findings
        if finding.location.phase == "gradient" and is_over(finding)
    }
    return sorted(unproven - found)


def traces(runs: RunPair) -> Pair:
    """Both sides' traces, read anew."""
    left, right = (side.trace for side in runs.results)
    assert left is not None, "a clean run has a trace"
    assert right is not None, "a clean run has a trace"
    return Pair(left, right)


def shares(comparison: Comparison) -> dict[str, float | None]:
    """The largest share of a bound by phase; None if it is infinite."""
    worst = {phase: comparison.worst[phase].used for phase in SHOWN if phase in comparison.worst}
    return {phase: share if np.isfinite(share) else None for phase, share in worst.items()}


def settings(case: Case, precision: Low, out: Path) -> tuple[str, ...]:
    """What the case changes in `configs/full.yaml`."""
    is_padded = case.filled.startswith("questions")
    return (
        f"model.from={out / model_name(case.variant, case.trained)}",
        f"data.train={data(case, out)}",
        "data.heldout=null",
        "run.eval_generations=0",
        f"data.task={'question_answering' if is_padded else 'text'}",
        f"data.sequence_tokens={case.tokens}",
        f"data.packing={str(not is_padded).lower()}",
        f"data.padding_side={'left' if case.filled.endswith('left') else 'right'}",
        "data.too_long=cut",
        "batch.global_examples=4",
        f"batch.accumulation={case.accumulation}",
        f"precision.policy={precision}",
        f"precision.reduce={case.reduce}",
        "optimizer.lr=1e-3",
        "schedule.warmup_steps=0",
        f"run.seed={case.seed}",
        "run.steps=20",
        f"method={METHODS[case.method].model_dump_json()}",
    )


def home(case: Case, out: Path) -> Path:
    """Where the case's files go."""
    words = (
        case.method,
        case.variant,
        case.trained,
        case.tokens,
        case.filled,
        case.accumulation,
        case.reduce,
        case.seed,
    )
    return out / "cases" / "-".join(map(str, words))


def model_name(variant: str, trained: int) -> str:
    """The directory of a model."""
    return f"models/{variant}-{trained}"


def make_models(wanted: set[tuple[str, int]], out: Path) -> None:
    """Make the models that are not there, in one process: the script loads torch, which is not to be loaded in this one."""
    commands = [
        [str(out / model_name(variant, trained)), "--steps", str(trained), *VARIANTS[variant]]
        for variant, trained in sorted(wanted)
        if not (out / model_name(variant, trained)).exists()
    ]
    if not commands:
        return
    child = multiprocessing.get_context("spawn").Process(target=run_script, args=(commands,))
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"{MODEL_SCRIPT.name} ended with exit code {child.exitcode}")


def run_script(commands: Sequence[Sequence[str]]) -> None:
    """Make a model for each command line."""
    main = runpy.run_path(str(MODEL_SCRIPT))["main"]
    for words in commands:
        sys.argv = [str(MODEL_SCRIPT), *words]
        main()


def data(case: Case, out: Path) -> Path:
    """Records or texts of the demo, or Chinese texts that are all byte tokens."""
    if case.filled != "chinese":
        return ROOT / "configs/data" / ("text-train.txt" if case.filled == "packed" else "qa-train.jsonl")
    path = out / "chinese.txt"
    path.write_text("\n\n".join(CHINESE * 16) + "\n", encoding="utf-8")
    return path


def read(out: Path) -> list[Record]:
    """The records of earlier runs. Raises UserError for one that does not say by which code and how it was made."""
    path = out / "results.jsonl"
    records: list[Record] = []
    for row, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), 1):
        record = json.loads(line)
        if missing := [key for key in KEYS if key not in record]:
            raise UserError(f"{path}:{row}: the record has no {missing[0]}; move the file away")
        records.append(record)
    return records


def lines(record: Record) -> list[str]:
    """One case on the terminal."""
    used = "  ".join(
        f"{phase} {number(record['used'].get(phase))}" for phase in ("loss", "gradient", "update")
    )
    shown = [f"{record['verdict']}  {used}  {record['name']}"]
    if record["first"]:
        shown.append(f"      {record['first']}")
    if record["unproven"]:
        shown.append(
            f"      not provable: {record['unproven']} of {record['examined']} gradients and updates"
        )
    if record["hidden"]:
        shown.append(f"      a mistake is hidden in {', '.join(record['hidden'])}")
    if record["control_passes"]:
        shown.append(f"      thirty times the rounding passes: {', '.join(record['control_passes'])}")
    return shown


def summary(records: Sequence[Record]) -> list[str]:
    """How many runs, how many false alarms, and the largest share of a bound by phase."""
    alarms = sum(record["verdict"] != "pass" for record in records)
    shown = [f"{len(records)} clean runs, {alarms} false alarms; largest share of a bound:"]
    for phase in SHOWN:
        share, name = largest(records, phase)
        shown.append(f"  {phase:10} {number(share):>6}  {name}")
    return shown


if __name__ == "__main__":
    sys.exit(main())
