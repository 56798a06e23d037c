"""`parity check`: both sides run as separate programs, here stand-ins that come first on the path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parity.check import check as run_check
from parity.cli import main
from parity.runs.sides import Side, parse_side
from trainspec.data import open_dataset
from trainspec.errors import UserError
from trainspec.runs.run import resolve

RECIPE = "model: {from: somewhere}\ndata: {train: some.jsonl}\nrun: {steps: 2}\n"
STAND_IN = """
import sys
sys.path[:0] = [%r]
from pathlib import Path
from synthetic import Sim, write
args = sys.argv[1:]
settings = dict(a.split("=", 1) for f, a in zip(args, args[1:]) if f == "--set")
print(" ".join(args))
out = Path(args[args.index("--out") + 1])
out.mkdir(parents=True)
(out / "recipe.yaml").write_text("run: {seed: %%s}" %% settings.get("run.seed", 0))
%s
steps = int(settings["run.stop_after_steps"])
write(Sim(steps=steps), Path(args[args.index("--trace") + 1]))
"""
STOPS = """
write(Sim(steps=1), Path(args[args.index("--trace") + 1]))
print("torchtrain: stopped before the update: the loss is nan at step 2; nothing was saved yet", file=sys.stderr)
raise SystemExit(1)
"""
REFUSES = 'print("torchtrain: plan.data=2: not so far", file=sys.stderr)\nraise SystemExit(2)'


def says(line: str, code: int) -> str:
    """The code of a stand-in that ends like this."""
    return f"print('torchtrain: ' + {line + '; nothing was saved yet'!r}, file=sys.stderr)\nraise SystemExit({code})"


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Run `parity check` with a stand-in for each backend; `torch` is what the right one does first."""

    def run(*flags: str, torch: str = "") -> int:
        for backend, body in (("jaxtrain", ""), ("torchtrain", torch)):
            (tmp_path / backend).mkdir()
            (tmp_path / backend / "__init__.py").touch()
            (tmp_path / backend / "__main__.py").write_text(STAND_IN % (str(Path(__file__).parent), body))
        (tmp_path / "demo.yaml").write_text(RECIPE)
        monkeypatch.chdir(tmp_path)
        return main(["check", "demo.yaml", *flags])

    return run


def test_two_equal_sides_pass(check, tmp_path, capsys):
    assert check("--right", "torch plan.data=2", "--set", "run.seed=3") == 0
    out = tmp_path / "runs/parity-demo"
    verdict = json.loads((out / "verdict.json").read_text())
    assert (verdict["verdict"], verdict["left"], verdict["right"]) == ("pass", "jax", "torch plan.data=2")
    assert (verdict["precision"], verdict["steps"]) == ("fp64", 2)
    assert "runs/parity-demo/report.html" in capsys.readouterr().out
    log = (out / "right/log.txt").read_text()
    for setting in ("plan.data=2", "run.seed=3", "precision.policy=fp64", "precision.reduce=fp64"):
        assert f"--set {setting}" in log
    assert "plan.data=2" not in (out / "left/log.txt").read_text()
    page = (out / "report.html").read_text()
    assert "run.seed=3" in page


def test_bf16_keeps_the_recipe_s_reduction(check, tmp_path):
    check("--precision", "bf16", "--out", "here")
    log = (tmp_path / "here/left/log.txt").read_text()
    assert "precision.policy=bf16" in log
    assert "precision.reduce" not in log


def test_a_side_that_stops_itself_fails_the_check(check, tmp_path, capsys):
    assert check(torch=STOPS) == 1
    first = json.loads((tmp_path / "runs/parity-demo/verdict.json").read_text())["first_divergence"]
    assert first["step"] == 2
    assert "nan at step 2" in first["reason"]
    assert "saved" not in first["reason"]  # a check saves nothing
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("torch", "code", "said"),
    [
        (REFUSES, 2, "parity: right (torch): plan.data=2: not so far\n"),
        ("raise KeyError('x')", 2, "parity: right (torch): crashed with exit code 1: KeyError: 'x'"),
        (
            says("KeyError: 'x'", 70),
            2,
            "parity: right (torch): crashed with exit code 70: KeyError: 'x'; the whole log",
        ),
        (
            says("/x: No space left on device", 3),
            3,
            "parity: right (torch): /x: No space left on device; the whole log",
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            3,
            "parity: right (torch): was ended by SIGKILL",
        ),
    ],
)
def test_what_a_side_says_is_passed_on_in_one_line(torch, code, said, check, capsys):
    assert check(torch=torch) == code
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--right", "tensorflow"], "torch"),
        (["--right", "torch plan.data"], "KEY=VALUE"),
        (["--right", "torch 'x"], "quotation"),
        (["--steps", "3"], "makes 2 updates"),
        (
            ["--right", "torch plan.fsdp=2 plan.shards=params"],
            "right (torch plan.fsdp=2 plan.shards=params): plan.",
        ),
        (["--right", "torch plan.data=2", "--precision", "bf16"], "use plan.fsdp=2"),
        (["--set", "run.stepps=3"], "did you mean 'steps'"),
    ],
)
def test_a_person_s_mistake_is_one_line_before_anything_runs(flags, word, check, tmp_path, capsys):
    assert check(*flags) == 2
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_recipe_in_epochs_is_compared_over_the_updates_that_its_data_make(make_recipe, tmp_path):
    recipe = make_recipe(run={"steps": None, "epochs": 0.01})
    updates = -(-open_dataset(resolve(recipe), "train").num_examples // 400)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    with pytest.raises(UserError, match=f"r.yaml makes {updates} updates; compare at most those"):
        run_check(
            tmp_path / "r.yaml", left=Side("jax"), right=Side("torch"), precision="fp64", steps=updates + 1,
            overrides=(), out=tmp_path / "check",
        )  # fmt: skip


def test_sides_are_read_as_words():
    assert parse_side("jax plan.data=2 plan.tensor=2") == Side("jax", ("plan.data=2", "plan.tensor=2"))
    assert str(parse_side("torch")) == "torch"
    with pytest.raises(UserError, match="jax"):
        parse_side("")


def test_parity_imports_no_framework():
    code = "import sys, parity.cli, parity.check; sys.exit(bool({'jax', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_finite_is_never_agreement():
    """A NaN on either side or an infinite bound must not pass as a small difference."""
    from parity.comparison.compare import _measure
    from parity.comparison.phases import Location
    from parity.comparison.tolerance import Bound, CheckedPair

    location, seven, nothing = Location(1, "moment1", "w"), np.array([7.0]), np.array([np.nan])
    for first, second, own, inherited in (
        (seven, nothing, seven, 0.0),
        (nothing, seven, seven, 0.0),
        (seven, seven, np.array([np.inf]), 0.0),
        (seven, 2 * seven, seven, np.inf),
        (seven, 2 * seven, nothing, 0.0),
    ):
        assert not _measure(location, CheckedPair(first, second, Bound(own, inherited))).holds
    assert _measure(location, CheckedPair(seven, seven, Bound(seven))).holds
