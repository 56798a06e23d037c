"""Two programs of a user, one in JAX and optax and one in torch: equal ones pass, each planted difference is placed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parity.cli import main

HERE = Path(__file__).parent / "twins"
OPTIMIZERS = ("sgd", "momentum", "adamw", "lion", "adafactor")
DECAYED = {"conv.weight", "hidden.weight", "head.weight"}
PLAIN = {"bn.weight", "bn.bias", "hidden.bias", "norm.weight", "norm.bias", "head.bias"}
# The torch case, and where its difference first shows, at step 1: the phase and the tensors that it may be in.
MISTAKES = {
    "adamw:tanh": ("activation", {"act"}),
    "sgd:eps": ("activation", {"norm"}),
    "lion:padding": ("activation", {"conv"}),
    "sgd:warmup": ("lr", {"lr"}),
    "adamw:warmup": ("lr", {"lr"}),
    "adamw:decay": ("update", DECAYED),
    "lion:decay": ("update", DECAYED),
    "adamw:mask": ("update", PLAIN),
    "lion:mask": ("update", PLAIN),
    "adamw:clip": ("clip", {"clip_factor"}),
    "sgd:clip": ("update", DECAYED | PLAIN),
    "momentum:clip": ("slot", {f"momentum/{name}" for name in DECAYED | PLAIN}),
    "lion:clip": ("slot", {f"momentum/{name}" for name in DECAYED | PLAIN}),
    "adamw:l2": ("moment1", DECAYED),
    "momentum:nesterov": ("update", DECAYED | PLAIN),
    "adafactor:biased": ("change", {"bn.running_var"}),
    "adamw:frozen": ("change", {"frozen.weight"}),
    "sgd:frozen": ("change", {"frozen.weight"}),
    "sgd:tau": ("change", {"target.weight"}),
    "adamw:tau": ("change", {"target.weight"}),
}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The traces of all cases, side-optimizer[-mistake]-dtype."""
    home = tmp_path_factory.mktemp("twins")
    for dtype in ("float64", "float32"):
        for program, cases in (("jax", OPTIMIZERS), ("torch", (*OPTIMIZERS, *MISTAKES))):
            argv = [sys.executable, str(HERE / f"{program}_program.py"), str(home), dtype, *cases]
            subprocess.run(argv, check=True, timeout=300)
    return home


def verdict_of(traces: Path, case: str, dtype: str, out: Path) -> dict:
    left, right = (
        traces / f"jax-{case.partition(':')[0]}-{dtype}",
        traces / f"torch-{case.replace(':', '-')}-{dtype}",
    )
    code = main(["diff", str(left), str(right), "--out", str(out)])
    verdict = json.loads((out / "verdict.json").read_text())
    assert code == (verdict["verdict"] != "pass")
    return verdict


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_equal_programs_pass(traces: Path, case: str, dtype: str, tmp_path: Path):
    verdict = verdict_of(traces, case, dtype, tmp_path)
    assert verdict["first_divergence"] is None
    assert verdict["precision"] == {"float64": "fp64", "float32": "fp32"}[dtype]
    assert {"change", "update", "gradient", "activation"} <= set(verdict["worst"])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", MISTAKES)
def test_a_planted_difference_is_placed(traces: Path, case: str, dtype: str, tmp_path: Path):
    phase, tensors = MISTAKES[case]
    first = verdict_of(traces, case, dtype, tmp_path)["first_divergence"]
    assert first is not None
    assert (first["step"], first["phase"]) == (1, phase), first
    assert first["tensor"] in tensors
