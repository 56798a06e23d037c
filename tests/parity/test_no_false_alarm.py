"""Clean runs must pass: every method with two seeds (Full and LoRA five), examples of up to 512 tokens, in fp64 and in fp32.

The seeds of a method take turns between the two precisions. `benchmarks/false_alarms.py` makes many more of them, and
`docs/false-alarms.md` has what those found. Each prints the largest share of its bounds that it uses
(`pytest -m full -s tests/parity/test_no_false_alarm.py`).
"""

from __future__ import annotations

import pytest
from asked import asked_for
from small import VARIANTS, recipe_maker

from parity.judging.many import CheckRequest, RunPair, make_runs
from parity.runs.fixture import METHODS
from parity.runs.sides import Side
from trainspec.methods import virtual_tokens
from trainspec.plans.plan import Policy
from trainspec.recipe import Recipe

LENGTHS = (64, 128, 256, 384, 512)
MORE_SEEDS = {"full": range(0, 10, 2), "lora": range(1, 10, 2)}
ALL_LINEAR = {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"}
PRECISIONS: tuple[Policy, Policy] = ("fp64", "fp32")
CASES = [
    (PRECISIONS[(i + turn) % 2], name, seed)
    for i, name in enumerate(METHODS)
    for turn, seed in enumerate(MORE_SEEDS.get(name, (i % 5, (i + 3) % 5)))
]


def recipe_of(make, method: str, seed: int) -> Recipe:
    variant = list(VARIANTS)[seed % len(VARIANTS)]
    tokens = min(
        LENGTHS[seed % len(LENGTHS)], VARIANTS[variant].max_positions - virtual_tokens(METHODS[method])
    )
    return make(
        variant,
        method=ALL_LINEAR if method == "lora" else METHODS[method].model_dump(),
        data={"sequence_tokens": tokens, "packing": seed % 2 == 0, "too_long": "cut"},
        batch={"global_examples": 4, "accumulation": 1 + seed % 2},
        optimizer={"lr": 2e-3, "weight_decay": 0.1, "clip_norm": 0.5},
        schedule={"kind": "cosine", "warmup_steps": 2},
        run={"steps": 20, "seed": seed},
    )


@pytest.fixture(scope="module")
def checked(model_dirs, tmp_path_factory, request):
    """The runs of a case: those of a precision are made together, in one process of each backend."""
    made: dict[Policy, dict[tuple[str, int], RunPair]] = {}
    make = recipe_maker(model_dirs)

    def run(precision: Policy) -> dict[tuple[str, int], RunPair]:
        home = tmp_path_factory.mktemp(precision)
        cases = [case for p, *case in asked_for(request, "precision", "method", "seed") if p == precision]
        groups = []
        for method, seed in cases:
            file = home / f"{method}-{seed}.yaml"
            file.write_text(recipe_of(make, method, seed).to_yaml())
            groups.append([CheckRequest(file, (), home / f"{method}-{seed}")])
        runs = make_runs(
            groups, sides=(Side("jax"), Side("torch")), precision=precision, steps=5, home=home / "launches"
        )
        return {(method, seed): pair for (method, seed), pair in zip(cases, runs, strict=True)}

    def pair(precision: Policy, method: str, seed: int) -> RunPair:
        if precision not in made:
            made[precision] = run(precision)
        return made[precision][method, seed]

    return pair


@pytest.mark.full(minutes=4)
@pytest.mark.parametrize(("precision", "method", "seed"), sorted(CASES))
def test_a_clean_run_passes(checked, capsys, precision: Policy, method: str, seed: int):
    comparison = checked(precision, method, seed).judged()
    used = {name: f"{finding.used:.2g}" for name, finding in comparison.worst.items() if finding.used}
    with capsys.disabled():
        print(f"\n{precision} {method} seed {seed}: {used}")
    assert comparison.holds, comparison.first_divergence
