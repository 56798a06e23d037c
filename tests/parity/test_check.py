"""`parity check`: both sides run as separate programs, here stand-ins that come first on the path."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from parity.check import check as run_check
from parity.cli import main
from parity.runs.programs import Launcher
from parity.runs.progress import WIDTH, Progress
from parity.runs.replay import records_of
from parity.runs.sides import Side, parse_side
from parity.runs.work import Size, Work, fit_at_once
from trainspec.data import open_dataset
from trainspec.errors import RecipeError, UserError
from trainspec.recipe import load_recipe
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

    def run(*flags: str, torch: str = "", jax: str = "") -> int:
        for backend, body in (("jaxtrain", jax), ("torchtrain", torch)):
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


def test_a_recipe_that_measures_held_out_records_is_checked_without_them(check, tmp_path):
    measured = ["data.heldout=other.jsonl", "run.eval_generations=2", "checkpoint.keep_best=1"]
    assert check(*(word for setting in measured for word in ("--set", setting))) == 0
    words = (tmp_path / "runs/parity-demo/left/log.txt").read_text().split()
    given = [word for flag, word in pairwise(words) if flag == "--set"]
    recipe = load_recipe(tmp_path / "demo.yaml", given)
    assert (recipe.data.heldout, recipe.run.eval_generations, recipe.checkpoint.keep_best) == (None, 0, 0)
    # Control: without held-out records, answers to them are refused.
    with pytest.raises(RecipeError, match=r"run\.eval_generations=2: without data\.heldout"):
        load_recipe(tmp_path / "demo.yaml", ["run.eval_generations=2"])


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


PRINTS = """
for step in range(1, 1 + int(settings["run.stop_after_steps"])):
    print(f"step {step:>5}  loss 1.0", flush=True)
"""


class Clock:
    """Seconds that go by with every look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def work(**changes) -> Work:
    size = Size(
        examples=16, sequence_tokens=128, slices=2, parameters=5_000_000, trained=5_000_000, layers=4, attention=576,
        stream=288, mlp=792, vocabulary=1024,
    )  # fmt: skip
    sides: tuple = (("jax", "jax"), ("torch plan.data=2", "torch"))
    return replace(Work("r.yaml", sides, size, "bf16", steps=10, draws=8, at_once=True), **changes)


def shown(*, watched: bool, seconds: float = 5.0) -> str:
    """What is shown of a check of ten updates, with its reference."""
    stream = io.StringIO()
    progress = Progress(stream, watched=watched, clock=Clock(seconds))
    progress.planned(work())
    for name in ("left", "right", "reference"):
        progress.started(name, 1)
    for step in range(1, 11):
        progress.said("left", f"step {step:>5}  loss 1.0")
        progress.said("left", "something else")
        progress.said("reference", f"reference of left: step {step}")
        progress.said("reference", f"reference of left: step {step}, draw 1")
    progress.ended("left")
    progress.comparing()
    progress.finished()
    return stream.getvalue()


def test_progress_is_one_line_on_a_terminal_that_is_gone_at_the_end():
    text = shown(watched=True)
    announced, _, rewritten = text.rpartition("\n")
    assert announced.count("\n") == len(work().announcement()) - 1
    assert "left 3/10 updates, right starting, reference of left: update 3/10, draw 1/8" in rewritten
    assert all(len(line) <= WIDTH for line in rewritten.split("\r\x1b[K"))
    assert rewritten.endswith("\r\x1b[K")


def test_elsewhere_progress_is_a_line_now_and_then():
    lines = shown(watched=False, seconds=0.5).splitlines()
    assert lines[: len(work().announcement())] == work().announcement()
    updates = [line for line in lines if "updates, right" in line]
    assert 2 <= len(updates) < 10
    assert not any("\r" in line or "\x1b" in line for line in lines)
    assert lines[-1] == "parity: comparing every tensor of 10 updates"
    assert len(shown(watched=False, seconds=0.01).splitlines()) < len(lines)


def test_nothing_is_written_before_the_first_update_so_that_a_mistake_is_one_line():
    stream = io.StringIO()
    progress = Progress(stream, watched=False, clock=Clock(0.1))
    progress.planned(work())
    progress.started("left", 1)
    progress.ended("left")
    progress.finished()
    assert stream.getvalue() == ""


def test_the_time_to_go_is_told_from_measured_updates():
    stream, clock = io.StringIO(), [0.0]
    progress = Progress(stream, watched=True, clock=lambda: clock[0])
    progress.planned(work(draws=0, precision="fp64"))
    progress.started("left", 1)
    for at, step in ((100.0, 1), (110.0, 2), (120.0, 3)):  # the first one compiles
        clock[0] = at
        progress.said("left", f"step {step:>5}  loss 1.0")
    assert "left 3/10 updates; 2 min so far, about 70 s to go for this part" in stream.getvalue()
    assert "left 1/10 updates; 2 min" not in stream.getvalue()


def test_the_announcement_says_what_runs_and_what_is_cheaper():
    text = "\n".join(work().announcement())
    assert "10 updates of 16 × 128 tokens on each side, 5 M of 5 M weights trained, in bf16" in text
    assert "left (jax) and right (torch plan.data=2) at the same time" in text
    assert "100 passes" in text  # ten of each side, and eight draws of ten
    assert all(
        word in text for word in ("a guess", "--steps 3", "--precision fp64", "data.sequence_tokens=64")
    )
    proof = "\n".join(work(draws=0, precision="fp64", steps=2, at_once=False).announcement())
    assert "one after the other" in proof
    assert "draws" not in proof
    assert "--steps" not in proof
    assert work(size=None).announcement() == []


def test_a_check_that_is_cheaper_is_guessed_to_be_so():
    whole = work().core_seconds
    assert work(steps=3).core_seconds < whole
    assert work(draws=0, precision="fp64").core_seconds < work(draws=0).core_seconds + whole
    size = work().size
    assert size is not None
    assert work(size=replace(size, sequence_tokens=64)).core_seconds < whole


def test_sides_run_at_once_only_where_memory_and_cores_are_there(monkeypatch):
    size = work().size
    assert size is not None
    needed = size.bytes_at_most("fp64")
    monkeypatch.setattr("parity.runs.work.cores", lambda: 2)
    monkeypatch.setattr("parity.runs.work.available_memory", lambda: int(needed * 4))
    assert fit_at_once(size, "fp64", programs=2)
    assert not fit_at_once(size, "fp64", programs=3)
    monkeypatch.setattr("parity.runs.work.cores", lambda: 1)
    assert not fit_at_once(size, "fp64", programs=2)


def test_two_sides_at_once_leave_the_same_verdict(check, tmp_path, monkeypatch, capsys):
    """Each waits for the other to have started, so one after the other they would never end."""
    monkeypatch.setattr("parity.check._known_run", lambda recipe: object())
    monkeypatch.setattr("parity.check.size_of", lambda run: work().size)
    monkeypatch.setattr("parity.check.fit_at_once", lambda *_, **__: True)
    monkeypatch.setattr("parity.check._Request.heads", {})
    meet = """
import time
mine = out.parent / "here"
mine.touch()
other = out.parent.parent / ("left" if out.parent.name == "right" else "right") / "here"
for _ in range(300):
    if other.exists():
        break
    time.sleep(0.1)
else:
    raise SystemExit("the other side never started")
"""
    assert check("--out", "both", torch=meet + PRINTS, jax=meet) == 0
    assert "updates" in capsys.readouterr().err
    verdict = json.loads((tmp_path / "both/verdict.json").read_text())
    assert (verdict["verdict"], verdict["steps"]) == ("pass", 2)


def test_a_side_that_fails_ends_the_other(tmp_path):
    launcher = Launcher()
    sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]

    def fails() -> None:
        raise UserError("the other side's mistake")

    def runs() -> None:
        codes.append(launcher.run("left", sleeps, log=tmp_path / "log.txt")[0])

    codes: list[int] = []
    with pytest.raises(UserError, match="the other side's mistake"):
        launcher.at_once([runs, fails])
    assert codes == [-15]


def test_a_program_that_starts_after_another_has_failed_is_ended_too(tmp_path):
    launcher = Launcher()
    failed = threading.Event()

    def fails() -> None:
        failed.set()
        raise UserError("a mistake")

    def starts() -> int:
        failed.wait()
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        return launcher.run("left", command, log=tmp_path / "log.txt")[0]

    with pytest.raises(UserError, match="a mistake"):
        launcher.at_once([starts, fails])


def test_the_reference_reads_a_trace_while_it_is_written(tmp_path):
    trace, ended = tmp_path / "trace", tmp_path / "ended"
    trace.mkdir()
    file = trace / "trace.jsonl"
    seen: list[int] = []

    def read() -> None:
        seen.extend(record["step"] for record in records_of(trace, ended))

    reader = threading.Thread(target=read)
    reader.start()
    with file.open("a") as out:
        for step in (1, 2):
            out.write(json.dumps({"step": step}) + "\n")
            out.flush()
        out.write('{"step": ')  # half a line is no record
        out.flush()
        out.write("3}\n")
    ended.touch()
    reader.join(timeout=60)
    assert seen == [1, 2, 3]
    assert [r["step"] for r in records_of(trace, None)] == [1, 2, 3]


def test_a_check_measures_no_held_out_loss(check, tmp_path):
    check("--out", "here")
    assert "--set data.heldout=null" in (tmp_path / "here/left/log.txt").read_text()


def test_parity_imports_no_framework():
    code = "import sys, parity.commands, parity.check; sys.exit(bool({'jax', 'torch'} & set(sys.modules)))"
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
