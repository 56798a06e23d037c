"""Clean runs must pass: every method with two seeds (Full and LoRA five), examples of up to 512 tokens, in fp64 and in fp32.

`benchmarks/false_alarms.py` makes many more of them, and `docs/false-alarms.md` has what those found.

Each prints the largest share of its bounds that it uses (`pytest -m full -s tests/parity/test_no_false_alarm.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from small import VARIANTS, recipe_maker

from parity.check import check
from parity.runs.fixture import METHODS
from parity.runs.sides import Side
from trainspec.methods import virtual_tokens

LENGTHS = (64, 128, 256, 384, 512)
MORE_SEEDS = {"full": range(0, 10, 2), "lora": range(1, 10, 2)}
ALL_LINEAR = {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"}


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize(
    ("method", "seed"),
    [(name, seed) for i, name in enumerate(METHODS) for seed in MORE_SEEDS.get(name, (i % 5, (i + 3) % 5))],
)
def test_a_clean_run_passes(model_dirs, tmp_path: Path, capsys, method: str, seed: int, precision):
    variant = list(VARIANTS)[seed % len(VARIANTS)]
    tokens = min(
        LENGTHS[seed % len(LENGTHS)], VARIANTS[variant].max_positions - virtual_tokens(METHODS[method])
    )
    recipe = recipe_maker(model_dirs)(
        variant,
        method=ALL_LINEAR if method == "lora" else METHODS[method].model_dump(),
        data={"sequence_tokens": tokens, "packing": seed % 2 == 0, "too_long": "cut"},
        batch={"global_examples": 4, "accumulation": 1 + seed % 2},
        optimizer={"lr": 2e-3, "weight_decay": 0.1, "clip_norm": 0.5},
        schedule={"kind": "cosine", "warmup_steps": 2},
        run={"steps": 20, "seed": seed},
    )
    file = tmp_path / "r.yaml"
    file.write_text(recipe.to_yaml())
    verdict = check(
        file,
        left=Side("jax"),
        right=Side("torch"),
        precision=precision,
        steps=5,
        overrides=(),
        out=tmp_path / "out",
    )
    worst = verdict.comparison.worst
    used = {name: f"{finding.used:.2g}" for name, finding in worst.items() if finding.used}
    with capsys.disabled():
        print(f"\n{precision} {method} {variant} seed {seed}, {tokens} tokens: {used}")
    assert verdict.holds, verdict.lines(colour=False)
