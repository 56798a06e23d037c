"""How much of its bounds a clean run uses: checks of runs without a fault, over models, methods, data and seeds.

    python benchmarks/false_alarms.py --cases 60 --seed 1 --precision fp32 [--out DIR]

Every case is a `parity check` of a few updates. The model is one of `scripts/make_demo_model.py`, trained for 0 to 200
steps (after 40, attention is still nearly uniform: there rounding is amplified the most). Cases are drawn by the seed:
bounds were chosen while looking at seed 0, so other seeds test them. A case that fails is a false alarm.
Prints each case with its largest share of a bound, then the largest by phase; exit code 1 after a false alarm.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parity.check import check
from parity.report.verdict import Verdict
from parity.runs.fixture import METHODS
from parity.runs.sides import Side

ROOT = Path(__file__).parent.parent
TRAINED_STEPS = (0, 10, 20, 40, 100, 200)
VARIANTS = {
    "plain": [],
    "tied": ["--tied"],
    "bias": ["--bias"],
    "llama3": ["--rope", "llama3"],
    "one-layer": ["--layers", "1"],
}
LENGTHS = (48, 96, 160, 256)
FILLED = ("packed", "padded-right", "padded-left", "chinese")
CHINESE = (
    "今天天气很好，我们去公园散步。",
    "机器翻译把一种语言的文字转换成另一种语言。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？",
)


@dataclass(frozen=True)
class Case:
    """A recipe without a fault."""

    trained: int
    variant: str
    method: str
    tokens: int
    filled: str
    accumulation: int
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.method}, {self.variant} after {self.trained} steps, {self.tokens} tokens {self.filled}, "
            f"accumulation {self.accumulation}, seed {self.seed}"
        )


def main() -> None:
    """Draw the cases, check them, print what they use."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=2, help="updates of each case")
    parser.add_argument("--out", type=Path, default=ROOT / "build/false-alarms")
    arguments = parser.parse_args()
    largest: dict[str, tuple[float, str]] = {}
    alarms = 0
    for number, case in enumerate(drawn(arguments.cases, arguments.seed)):
        verdict = checked(case, arguments.precision, arguments.steps, arguments.out)
        alarms += not verdict.holds
        used = {phase: finding.used for phase, finding in verdict.comparison.worst.items()}
        for phase, share in used.items():
            largest[phase] = max(largest.get(phase, (0.0, "")), (share, str(case)))
        shown = "  ".join(f"{phase} {used.get(phase, 0):.2g}" for phase in ("loss", "gradient", "update"))
        print(f"{number + 1:3} {verdict.word}  {shown}  {case}", flush=True)
        if not verdict.holds:
            print("\n".join(verdict.lines(colour=False)[:3]), flush=True)
    print(
        f"{arguments.cases} clean runs in {arguments.precision}, {alarms} false alarms; largest share of a bound:"
    )
    for phase, (share, case) in largest.items():
        print(f"  {phase:20} {share:.3g}  {case}")
    sys.exit(1 if alarms else 0)


def drawn(cases: int, seed: int) -> list[Case]:
    """Cases in which every value of every property comes equally often, paired at random."""
    random = np.random.default_rng(seed)

    def dealt(values: tuple) -> list:
        repeated = [values[i % len(values)] for i in range(cases)]
        return [repeated[i] for i in random.permutation(cases)]

    columns = (
        dealt(TRAINED_STEPS),
        dealt(tuple(VARIANTS)),
        dealt(tuple(METHODS)),
        dealt(LENGTHS),
        dealt(FILLED),
        dealt((1, 2)),
        [int(random.integers(1000)) for _ in range(cases)],
    )
    return [Case(*values) for values in zip(*columns, strict=True)]


def checked(case: Case, precision: str, steps: int, out: Path) -> Verdict:
    """The verdict on one case; everything it writes goes under `out`."""
    settings = [
        f"model.from={model(case, out)}",
        f"data.train={data(case, out)}",
        "data.heldout=null",
        "data.task=text",
        f"data.sequence_tokens={case.tokens}",
        f"data.packing={str(case.filled in ('packed', 'chinese')).lower()}",
        f"data.padding_side={'left' if case.filled == 'padded-left' else 'right'}",
        "data.too_long=cut",
        "batch.global_examples=4",
        f"batch.accumulation={case.accumulation}",
        "optimizer.lr=1e-3",
        f"run.seed={case.seed}",
        "run.steps=20",
        f"method={METHODS[case.method].model_dump_json()}",
    ]
    return check(
        ROOT / "configs/full.yaml",
        left=Side("jax"),
        right=Side("torch"),
        precision=precision,  # pyright: ignore[reportArgumentType]
        steps=steps,
        overrides=settings,
        out=out / "check",
    )


def model(case: Case, out: Path) -> Path:
    """The case's model, made once."""
    directory = out / f"{case.variant}-{case.trained}"
    words = ["--steps", str(case.trained), "--hidden", "64", *VARIANTS[case.variant]]
    script = ROOT / "scripts/make_demo_model.py"
    subprocess.run([sys.executable, str(script), str(directory), *words], check=True, capture_output=True)
    return directory


def data(case: Case, out: Path) -> Path:
    """Texts of the demo, or Chinese ones that are all byte tokens."""
    if case.filled != "chinese":
        return ROOT / "configs/data/text-train.txt"
    path = out / "chinese.txt"
    path.write_text("\n\n".join(CHINESE * 16) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
