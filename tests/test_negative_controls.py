"""A check that cannot fail proves nothing: mistakes planted in one real backend must fail the verdict, exit code 1."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from many import run_many
from small import ROOT, recipe_maker

from trainspec.recipe import Recipe

Edits = list[tuple[str, str, str]]
ADAMW = """class _AdamW(torch.optim.AdamW):
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr, eps = group["betas"], group["lr"], group["eps"]
            for p in group["params"]:
                s = self.state[p]
                s["step"] += 1
                t = s["step"].item()
                s["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                s["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                m, v = s["exp_avg"] / (1 - b1**t), s["exp_avg_sq"] / (1 - b2**t)
                p.sub_(lr * (m / ROOT + group["weight_decay"] * p))


def make_optimizer("""


def torch_adamw(root: str) -> Edits:
    """torchtrain with an AdamW written out, whose denominator is `root`."""
    return [
        ("torchtrain.optim", "def make_optimizer(", ADAMW.replace("ROOT", root)),
        ("torchtrain.optim", "optimizer = torch.optim.AdamW(", "optimizer = _AdamW("),
    ]


# mistake -> (edits of jaxtrain, edits of torchtrain, the phase where it must first show)
MISTAKES: dict[str, tuple[Edits, Edits, str]] = {
    "rate off by a millionth": (
        [("jaxtrain.optim", "return Rates(lr,", "return Rates(lr * (1 + 1e-6),")],
        [("torchtrain.optim", 'group["lr"] = lr', 'group["lr"] = lr * (1 + 1e-6)')],
        "update",
    ),
    "eps inside the root": (
        [("jaxtrain.optim", "jnp.sqrt(moment2[name]) / jnp.sqrt(rates.correction2) + spec.eps",
          "jnp.sqrt(moment2[name] / rates.correction2 + spec.eps)")],
        torch_adamw("(v + eps).sqrt()"),
        "update",
    ),
    "mean of means": (
        [("jaxtrain.step", "jax.tree.map(jnp.add, totals[2], gradients)",
          "jax.tree.map(lambda a, g: a + g / tokens, totals[2], gradients)"),
         ("jaxtrain.step", "lambda g: g / tokens, sums", "lambda g: g / len(stacked['labels']), sums")],
        [("torchtrain.step", "part_loss / batch.target_tokens", "part_loss / part.target_tokens / len(parts)")],
        "gradient",
    ),
    "an update that never happens": (
        [("jaxtrain.step", "return jax.tree.map(jnp.add, trainable, deltas), cast",
          "return jax.tree.map(lambda w, d: w + 0 * d, trainable, deltas), cast")],
        [("torchtrain.optim", 'group["lr"] = lr', 'group["lr"] = 0.0')],
        "update",
    ),
    "labels shifted once more": (
        [("jaxtrain.loss", "wide = logits[:, :-1].astype", "wide = jnp.roll(logits, 1, axis=1)[:, :-1].astype")],
        [("torchtrain.loss", "F.pad(labels[:, 1:], (0, 1), value=IGNORED)",
          "F.pad(labels[:, 1:], (0, 1), value=IGNORED).roll(1, dims=1)")],
        "loss",
    ),
}  # fmt: skip
# The AdamW written out is itself no mistake: with torch's own denominator the check passes.
HARMLESS: tuple[Edits, Edits, str] = ([], torch_adamw("(v.sqrt() + eps)"), "")
PROGRAMS = ("jaxtrain", "torchtrain")


def plant(program: str, cases: list[tuple[list[str], Edits]], scratch: Path) -> None:
    scratch.mkdir()
    written = [
        {
            "program": program,
            "argv": argv,
            "edits": [dict(zip(("module", "old", "new"), e, strict=True)) for e in edits],
        }
        for argv, edits in cases
    ]
    (scratch / "cases.json").write_text(json.dumps(written))
    command = [
        sys.executable,
        "-m",
        "parity.plant",
        str(scratch / "cases.json"),
        str(scratch / "results.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for (_, edits), result in zip(cases, json.loads((scratch / "results.json").read_text()), strict=True):
        assert result["code"] == 0, f"{edits}: {result['err'][-2000:]}"


@pytest.fixture(scope="module")
def traces(model_dirs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/PROGRAM/MISTAKE/trace, and `clean`, of the same recipe in float64."""
    root = tmp_path_factory.mktemp("controls")
    make: Callable[..., Recipe] = recipe_maker(model_dirs, root / "cache")
    recipe = make(
        method={"kind": "full"},
        precision={"policy": "fp64", "reduce": "fp64"},
        batch={"global_examples": 4, "accumulation": 2},
        optimizer={"weight_decay": 0.1},
        run={"steps": 3},
    )
    (root / "r.yaml").write_text(recipe.to_yaml())
    for side, program in enumerate(PROGRAMS):
        named = {"clean": [], "harmless": HARMLESS[side]} | {
            name: edits[side] for name, edits in MISTAKES.items()
        }
        argv = ["train", str(root / "r.yaml"), "--out"]
        homes = {name: root / program / name.replace(" ", "-") for name in named}
        cases = [
            ([*argv, str(homes[name] / "run"), "--trace", str(homes[name] / "trace")], edits)
            for name, edits in named.items()
        ]
        (root / program).mkdir()
        plant(program, cases, root / program / "planted")
    return root


def compare(root: Path, left: str, right: str, out: Path) -> tuple[int, dict]:
    argv = ["diff", str(root / left / "trace"), str(root / right / "trace"), "--out", str(out)]
    [result] = run_many("parity", [argv], out / "many")
    return result["code"], json.loads((out / "verdict.json").read_text())


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_mistake_fails_the_check(traces: Path, program: str, mistake: str, tmp_path: Path):
    sides = {p: f"{p}/{mistake.replace(' ', '-') if p == program else 'clean'}" for p in PROGRAMS}
    code, verdict = compare(traces, sides["jaxtrain"], sides["torchtrain"], tmp_path)
    assert code == 1
    assert verdict["verdict"] == "fail"
    assert verdict["first_divergence"]["step"] == 1
    assert verdict["first_divergence"]["phase"] == MISTAKES[mistake][2]


@pytest.mark.parametrize("right", ["clean", "harmless"])
def test_without_a_mistake_it_passes(traces: Path, right: str, tmp_path: Path):
    code, verdict = compare(traces, "jaxtrain/clean", f"torchtrain/{right}", tmp_path)
    assert (code, verdict["verdict"]) == (0, "pass")
