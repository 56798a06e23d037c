"""The proof on the device itself: small models on a GPU in float64, float32 and bfloat16, kernels against the definition.

    python benchmarks/check_on_gpu.py [--device gpu] [--only packed ...] [--precision fp64 ...] [--steps 3] [--out DIR] [--list]

Both backends train every case, one after the other, and each is judged as `parity check --device gpu` judges it: in float64
against the other, else against a float64 reference of its own steps, whose attention is the definition (`plan.attention=reference`).
`auto` is the kernel that a backend takes for that precision by itself, `reference` the definition. All models have grouped kv heads.
Each program is started once per precision; on one GPU all of it is made for less than ten minutes. Exit code 1 if a case fails.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parity.comparison.compare import Comparison
from parity.judging.many import CheckRequest, make_runs
from parity.report.verdict import explained
from parity.runs.devices import REFERENCE_BACKEND, Placement, Program, look_for, placed
from parity.runs.fixture import METHODS, TINY, TinySetup, write_tiny
from parity.runs.sides import NAMES, Side
from parity.runs.work import in_words
from trainspec.errors import EXIT_MACHINE, EXIT_USER_ERROR, MachineError, UserError
from trainspec.files.hf import write_model
from trainspec.files.model_config import config_of
from trainspec.init import initial_value
from trainspec.params import param_table
from trainspec.plans.names import DEVICES, Device, Policy

# Grouped heads of a size that every kernel takes (a multiple of 8), and rows of several of their blocks.
SPEC = replace(TINY, name="grouped", embed=128, heads=8, kv_heads=2, head_dim=32, mlp=256, max_positions=1024)
ROW_TOKENS = 256
SIDES = (Side("jax"), Side("torch"))
# Of each precision: how attention is computed.
ATTENTION: Mapping[Policy, tuple[str, ...]] = {
    "fp64": ("reference",),
    "fp32": ("auto", "reference"),
    "bf16": ("auto", "reference"),
}
PACKED: Mapping[str, Any] = {"packing": True, "sequence_tokens": ROW_TOKENS}
# Method and data of each case.
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "packed": ("full", PACKED),
    "prefix": ("prefix", PACKED),
    "padded": ("lora", {"sequence_tokens": ROW_TOKENS // 4, "padding_side": "left"}),
}
SHOWN = ("loss", "gradient", "update")


@dataclass(frozen=True)
class Case:
    """One recipe in one precision, with one way to compute attention."""

    name: str
    precision: Policy
    attention: str

    def request(self, tiny: TinySetup, model: Path, out: Path) -> CheckRequest:
        """Its check, whose recipe is written under `out`."""
        method, data = CASES[self.name]
        home = out / "-".join((self.name, self.precision, self.attention))
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        recipe = tiny.recipe(
            model={"from": str(model)}, method=METHODS[method].model_dump(mode="python"), data=data,
            batch={"global_examples": 4, "accumulation": 2}, plan={"attention": self.attention},
            precision={"policy": self.precision, "reduce": "fp32" if self.precision == "bf16" else self.precision},
        )  # fmt: skip
        (home / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        return CheckRequest(home / "recipe.yaml", (), home)


def cases(names: list[str], precisions: list[Policy]) -> Iterator[Case]:
    """The cases of those names and precisions; all where there are none."""
    for precision, ways in ATTENTION.items():
        for name in CASES:
            if precision in (precisions or ATTENTION) and name in (names or CASES):
                yield from (Case(name, precision, attention) for attention in ways)


def write_grouped(tiny: TinySetup, directory: Path) -> Path:
    """A model of `SPEC` with random weights and the tokenizer of the tiny one."""
    weights = ((p.name, initial_value(p, seed=1, dtype="float32")) for p in param_table(SPEC))
    ends = {"dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_model(directory, weights, companions_from=tiny.model("plain"), config=config_of(SPEC) | ends)
    return directory


def placement(device: Device, precision: Policy) -> Placement:
    """Both sides and the reference on that device."""
    wanted = [Program(n, f"{n} ({s})", s.backend, device) for n, s in zip(NAMES, SIDES, strict=True)]
    if precision != "fp64":
        wanted.append(
            replace(wanted[0], name="reference", words="the float64 reference", backend=REFERENCE_BACKEND)
        )
    return placed(wanted, float64=precision == "fp64", look=look_for)


def row(case: Case, comparison: Comparison) -> str:
    """A line of the table: the share of its bound that each phase uses at most."""
    worst = comparison.worst
    used = "".join(f"{worst[phase].used:>10.2g}" if phase in worst else f"{'–':>10}" for phase in SHOWN)
    first = comparison.first_divergence
    end = f"  {first.location}: {explained(first)}" if first else ""
    verdict = "pass" if comparison.holds else "FAIL"
    return f"{case.name:<9}{case.precision:<6}{case.attention:<11}{verdict:<6}{used}{end}"


def main() -> int:
    """Run the cases and print the table; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEVICES, default="gpu")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), default=[])
    parser.add_argument("--precision", nargs="+", choices=tuple(ATTENTION), default=[])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/check-on-gpu"))
    parser.add_argument("--list", action="store_true", help="list the cases and run nothing")
    args = parser.parse_args()
    asked = list(cases(args.only, args.precision))
    if args.list:
        print("\n".join(f"{case.name:<9}{case.precision:<6}{case.attention}" for case in asked))
        return 0
    print(f"$ {shlex.join(['python', *sys.argv])}\n{platform.platform()}, {args.steps} updates each")
    of_precision: dict[Policy, list[Case]] = {}
    for case in asked:
        of_precision.setdefault(case.precision, []).append(case)
    try:
        places = {precision: placement(args.device, precision) for precision in of_precision}
    except (UserError, MachineError) as error:
        print(f"check_on_gpu: {error}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_MACHINE
    tiny = write_tiny(args.out / "tiny")
    model = write_grouped(tiny, args.out / "model")
    phases = "".join(f"{phase:>10}" for phase in SHOWN)
    print(f"{'case':<9}{'in':<6}{'attention':<11}{'':<6}{phases}  (share of the bound)")
    fails = 0
    for precision, mine in of_precision.items():
        began, place = time.monotonic(), places[precision]
        groups = [[case.request(tiny, model, args.out)] for case in mine]
        try:
            runs = make_runs(
                groups, sides=SIDES, precision=precision, steps=args.steps, home=args.out / f"launches-{precision}",
                placement=place,
            )  # fmt: skip
        except (UserError, MachineError) as error:
            fails += 1
            print(f"{precision}: {error}", flush=True)
            continue
        for case, pair in zip(mine, runs, strict=True):
            comparison = pair.judged()
            fails += not comparison.holds
            print(row(case, comparison), flush=True)
        where = ", ".join(f"{name} on {place.of(name)}" for name in (*NAMES, "reference"))
        print(f"{precision}: {where}: {in_words(time.monotonic() - began)}", flush=True)
    return 1 if fails else 0


if __name__ == "__main__":
    raise SystemExit(main())
