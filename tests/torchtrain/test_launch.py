"""Starting the processes of a run: who is who, one line for a user's mistake, and nothing that stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small import ROOT

from torchtrain.cli import main
from torchtrain.cluster import check_gpus
from torchtrain.launch import _Failure, _first_failure, _received
from torchtrain.processes import count_processes, describe_cluster, has_launcher
from trainspec.errors import PlanError
from trainspec.runs.stops import StopRequest

LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
PROGRAM = [sys.executable, "-m", "torchtrain"]


def plan_file(make_recipe, tmp_path: Path, **sections) -> Path:
    sections = {"plan": {"data": 2}, "precision": {"policy": "fp64", "reduce": "fp64"}} | sections
    file = tmp_path / "recipe.yaml"
    file.write_text(make_recipe(**sections).to_yaml())
    return file


# What is planted imports trainspec before `-m` puts the working directory on the path.
PLANTED = os.pathsep.join([str(ROOT / "tests/planted"), str(ROOT)])
# What gloo says, and nobody else: it closes where it can, and is reset where the kernel ends a process with data under way.
PEER = re.compile("Connection (closed|reset) by peer")


def planted(file: Path, out: Path, where: str, what: str) -> tuple[int, str, dict[int, str]]:
    """A run in two processes, of which those named do `what` after its second update, when a checkpoint was written.

    Gives the exit code, what is on the console besides the leader's steps, and the log of each process.
    """
    done = run(
        "train", file, "--out", out, "--set", "checkpoint.every_steps=2", "--set", "run.steps=4",
        "--set", "checkpoint.asynchronous=false", PYTHONPATH=PLANTED, PLANTED_IN=where, PLANTED=what,
    )  # fmt: skip
    assert done.stdout.count("\nstep ") == 2
    logs = {rank: out / f"logs/process-{rank}.txt" for rank in range(2)}
    return done.returncode, done.stderr, {n: f.read_text() if f.exists() else "" for n, f in logs.items()}


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, words)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_slurm_says_who_is_who():
    step = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[03-05,09],login1",
        "SLURM_JOB_ID": "123456",
    }
    assert describe_cluster(step) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "23456",
    }
    assert describe_cluster(step | {"SLURM_STEP_NODELIST": "one,two"})["MASTER_ADDR"] == "one"
    assert describe_cluster(step | {"RANK": "0"}) == {}  # torchrun inside a job step
    assert describe_cluster({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) == {}  # a batch script, no step
    assert has_launcher(step)
    assert has_launcher(LAUNCHER | {"WORLD_SIZE": "2"})
    assert not has_launcher({"WORLD_SIZE": "1"})


@pytest.mark.parametrize(
    ("left_over", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, MASTER_ADDR, MASTER_PORT: not"),
        (LAUNCHER | {"WORLD_SIZE": "2", "RANK": "two"}, "WORLD_SIZE=2 RANK=two LOCAL_RANK=0: not"),
        ({"RANK": "1"}, "RANK=1: not"),
    ],
)
def test_what_no_launcher_says_is_one_line(make_recipe, tmp_path, monkeypatch, capsys, left_over, said):
    with pytest.raises(PlanError, match=re.escape(said)):
        count_processes(left_over)
    for name in ("WORLD_SIZE", *LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torchtrain.cli._FOLLOWER_DELAY_SECONDS", 0.0)
    for command in ("train", "export"):
        assert main([command, str(plan_file(make_recipe, tmp_path)), "--out", str(tmp_path / "run")]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"torchtrain: {said} what a launcher says; unset ")
        assert told.count("\n") == 1


def test_processes_that_would_share_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_gpus(2)
    with pytest.raises(PlanError, match="3 processes on this machine, which shows 2 GPUs; use"):
        check_gpus(3)


def test_who_follows_says_only_why_it_failed(make_recipe, tmp_path, monkeypatch, capsys):
    for name, value in (LAUNCHER | {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    file, out = plan_file(make_recipe, tmp_path), tmp_path / "run"

    def ended(outcome) -> str:
        def train(*_: object, **__: object) -> None:
            print("a warning", file=sys.stderr)
            if outcome is not None:
                raise outcome

        monkeypatch.setattr("torchtrain.train.train", train)
        main(["train", str(file), "--out", str(out)])
        return capsys.readouterr().err

    assert ended(None) == ended(KeyboardInterrupt()) == ""
    assert not slept
    assert "went wrong" in ended(PlanError("went wrong"))
    assert len(slept) == 1
    crashed = ended(ZeroDivisionError())
    assert "a warning" in crashed
    assert crashed.endswith("\ntorchtrain: ZeroDivisionError\n")
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["train"])
    assert capsys.readouterr().err.endswith("RECIPE; see torchtrain train --help\n")
    assert main(["export", str(file), "--out", str(out)]) == 0  # the leader writes it
    assert not out.exists()


def test_a_mistake_in_the_plan_starts_nothing_and_is_one_line(make_recipe, tmp_path):
    began = plan_file(make_recipe, tmp_path, plan={"tensor": 3})
    done = run("train", began, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("torchtrain: plan.tensor=3 cannot split heads=4")
    assert done.stderr.count("\n") == 1


@pytest.mark.full
def test_another_number_of_processes_than_the_plan_takes_is_one_line(make_recipe, tmp_path):
    four = LAUNCHER | {"WORLD_SIZE": "4"}
    done = run("train", plan_file(make_recipe, tmp_path), "--out", tmp_path / "run", **four)
    assert done.returncode == 2
    assert "4 processes, the plan takes 2" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.full
def test_processes_are_started_and_a_mistake_that_they_find_is_one_line(make_recipe, tmp_path):
    file = plan_file(make_recipe, tmp_path, run={"steps": 1})
    done = run("train", file, "--out", tmp_path / "run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("step     1") == 1
    again = run("train", file, "--out", tmp_path / "run")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "continue with --resume" in again.stderr


MISTAKE = "from trainspec.errors import DataError; raise DataError('line 7: no record')"


@pytest.mark.full
def test_of_several_processes_the_one_that_failed_first_speaks(make_recipe, tmp_path):
    """And not the leader, whose connection it broke."""
    file, out = plan_file(make_recipe, tmp_path), tmp_path / "run"
    code, told, logs = planted(file, out, "1", MISTAKE)
    saved = f"saved: {out}/checkpoints/step-000002; continue with --resume"
    where = f"torchtrain: process 1 of 2 (the stacks of all are in {out}/logs): "
    assert (code, told) == (2, f"{where}line 7: no record; {saved}\n")
    assert "DataError: line 7: no record" in logs[1]
    assert not PEER.search(logs[1])
    assert PEER.search(logs[0])
    assert logs[0].count("Traceback (most recent call last)") == 1


def test_a_crash_of_one_process_is_one_line_too(make_recipe, tmp_path):
    file, out = plan_file(make_recipe, tmp_path), tmp_path / "run"
    code, told, logs = planted(file, out, "1", "{}['x']")
    assert code == 70
    assert told.startswith(
        f"torchtrain: process 1 of 2 (the stacks of all are in {out}/logs): KeyError: 'x'; saved: "
    )
    assert told.count("\n") == 1
    assert "KeyError: 'x'" in logs[1]
    # The other either notices that its peer is gone, or is still busy when it is asked for its stacks and ended.
    assert PEER.search(logs[0]) or "most recent call first" in logs[0]


@pytest.mark.full
def test_a_killed_process_is_the_first_to_fail(make_recipe, tmp_path):
    file, out = plan_file(make_recipe, tmp_path), tmp_path / "run"
    code, told, logs = planted(file, out, "1", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    saved = f"saved: {out}/checkpoints/step-000002; continue with --resume"
    assert (code, told) == (
        3,
        "torchtrain: process 1 of 2 was ended by SIGKILL, as the kernel does where memory is full; "
        f"the stacks of all are in {out}/logs; {saved}\n",
    )
    assert PEER.search(logs[0])


@pytest.mark.full
def test_the_leader_may_be_the_first_to_fail(make_recipe, tmp_path):
    file, out = plan_file(make_recipe, tmp_path), tmp_path / "run"
    code, told, logs = planted(file, out, "0", "raise OSError(28, 'No space left on device', 'a/b')")
    where = f"torchtrain: process 0 of 2 (the stacks of all are in {out}/logs): "
    saved = f"saved: {out}/checkpoints/step-000002; continue with --resume"
    assert (code, told) == (3, f"{where}a/b: No space left on device; {saved}\n")
    assert "OSError: [Errno 28]" in logs[0]
    assert PEER.search(logs[1])


@pytest.mark.full
def test_a_process_that_is_stuck_is_asked_where_and_ended(make_recipe, tmp_path):
    file, out = plan_file(make_recipe, tmp_path), tmp_path / "run"
    waits = f"import os, time\nif os.environ['RANK'] == '0': time.sleep(10**6)\n{MISTAKE}"
    code, told, logs = planted(file, out, "0 1", waits)
    assert code == 2
    assert told.startswith("torchtrain: process 1 of 2 (the stacks of all are in ")
    assert 'File "<string>", line 2 in <module>' in logs[0]  # written from within the sleep
    assert "torchtrain/cli.py" in logs[0]


@pytest.mark.full
def test_what_all_processes_say_is_about_none_of_them(make_recipe, tmp_path):
    file, out = plan_file(make_recipe, tmp_path), tmp_path / "run"
    code, told, _ = planted(file, out, "0 1", MISTAKE)
    saved = f"saved: {out}/checkpoints/step-000002; continue with --resume"
    assert (code, told) == (2, f"torchtrain: line 7: no record; {saved}\n")


@pytest.mark.parametrize("letter", ["x", "字"])
def test_a_long_line_reaches_the_launcher_with_both_its_ends(letter):
    reads, writes = os.pipe()
    code = (
        "from torchtrain.launch import report_to_launcher\n"
        f"report_to_launcher()(2, 'a ' + 5000 * {letter!r} + ' z')"
    )
    group = {"RANK": "1", "TWINTRAIN_REPORTS_FD": str(writes)}
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | group, pass_fds=[writes], check=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    raw = os.read(reads, 2**16)
    os.write(writes, raw)
    [failure] = _received(reads)
    os.close(writes)
    os.close(reads)
    assert len(raw) < 4096
    assert (failure.rank, failure.code, failure.line[:2], failure.line[-2:]) == (1, 2, "a ", " z")


class Child:
    """A process whose ends are seen one after the other; the last one stays."""

    def __init__(self, *codes: int | None) -> None:
        self._codes = list(codes)
        self.sent: list[int] = []

    def poll(self) -> int | None:
        return self._codes.pop(0) if len(self._codes) > 1 else self._codes[0]

    def send_signal(self, number: int) -> None:
        self.sent.append(number)


@pytest.mark.parametrize(
    ("children", "told", "first"),
    [
        ([Child(0), Child(None, 0)], [], None),
        ([Child(None, 3), Child(None, 2)], [(1, 2, "cause"), (0, 3, "connection")], (1, 2, "cause")),
        # The connection of a process that was killed breaks before the kernel says that it has ended.
        ([Child(None), Child(None, -9)], [(0, 3, "connection")], (1, None, "was ended by SIGKILL, as the kernel")),
        ([Child(None), Child(None, 9)], [(0, 3, "connection")], (1, None, "ended with exit code 9 and did")),
        # NCCL's way to end a process whose peer is gone; but it may also be the only one that ended.
        ([Child(-6), Child(2)], [(1, 2, "cause")], (1, 2, "cause")),
        ([Child(-6), Child(None)], [], (0, None, "was ended by SIGABRT")),
        ([Child(-6), Child(-11)], [], (1, None, "was ended by SIGSEGV")),
    ],
)  # fmt: skip
def test_who_was_the_first_to_fail(children, told, first, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    rest = [[_Failure(*failure) for failure in told]]
    monkeypatch.setattr("torchtrain.launch._received", lambda reports: rest.pop() if rest else [])
    failure, _ = _first_failure(children, 0, StopRequest())
    if first is None:
        assert failure is None
    else:
        assert failure[:2] == first[:2]
        assert failure.line.startswith(first[2])


@pytest.mark.parametrize(
    ("children", "told", "first"),
    [
        # All have saved: the leader speaks.
        ([Child(None, None, 75), Child(None, 75)], [(1, 75, "stopped"), (0, 75, "stopped after 3")], (0, 75, "stopped after 3")),
        # It came after the last update.
        ([Child(None, None, 0), Child(None, None, 0)], [], None),
        # Before they had begun to listen: no failure, though the one that was quicker misses the other.
        ([Child(None, None), Child(None, None, -15)], [(0, 3, "connection")], (1, 75, "stopped by SIGTERM")),
        # One is killed while it saves.
        ([Child(None, None), Child(None, None, -9)], [], (1, None, "was ended by SIGKILL")),
        # One cannot save.
        ([Child(None, None), Child(None, None, 3)], [(1, 3, "disk")], (1, 3, "disk")),
    ],
)  # fmt: skip
def test_processes_that_were_asked_to_stop(children, told, first, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    rest = [[], [_Failure(*failure) for failure in told], []]
    monkeypatch.setattr("torchtrain.launch._received", lambda reports: rest.pop() if rest else [])
    stop = StopRequest()
    stop.defer()
    stop.hear(signal.SIGTERM)
    failure, _ = _first_failure(children, 0, stop)
    assert [child.sent for child in children] == [[signal.SIGTERM]] * 2  # once
    assert (failure and failure[:2]) == (first and first[:2])
    assert failure is None or failure.line.startswith(first[2])


def test_processes_that_do_not_stop_are_ended(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("torchtrain.launch._received", lambda reports: [])
    monkeypatch.setattr("torchtrain.launch._STOP_SECONDS", -1.0)
    stop = StopRequest()
    stop.defer()
    stop.hear(signal.SIGINT)
    failure, _ = _first_failure([Child(None), Child(75)], 0, stop)
    assert failure == (0, None, "has not stopped in -1 s after Ctrl-C")


@pytest.mark.full
def test_a_process_that_ends_without_a_word_is_named(make_recipe, tmp_path):
    file, out = plan_file(make_recipe, tmp_path), tmp_path / "run"
    code, told, _ = planted(file, out, "1", "import os; os._exit(9)")
    assert code == 3
    assert told.startswith(
        "torchtrain: process 1 of 2 ended with exit code 9 and did not say why; the stacks of all"
    )
    assert told.count("\n") == 1


@pytest.mark.full
def test_a_loss_that_is_no_number_is_exit_code_1(make_recipe, tmp_path):
    file = plan_file(make_recipe, tmp_path, method={"kind": "full"})
    done = run("train", file, "--out", tmp_path / "run", "--set", "optimizer.lr=1e38")
    assert done.returncode == 1
    assert done.stderr.startswith("torchtrain: stopped before")
    assert done.stderr.count("\n") == 1


def endless(make_recipe, tmp_path: Path) -> Path:
    return plan_file(make_recipe, tmp_path, run={"steps": 10**6}, checkpoint={"every_steps": 10**6})


def children_of(pid: int) -> list[int]:
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            pids.append(int(path.parent.name))
    return pids


@contextmanager
def running(file: Path, out: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run after its first step, in a group of its own, and its processes; they have ended after the block."""
    # A shell's background ignores an interruption, and so would what is started from there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [*PROGRAM, "train", str(file), "--out", str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as parent:  # fmt: skip
        signal.signal(signal.SIGINT, before)
        try:
            assert parent.stdout is not None
            for line in parent.stdout:
                if line.startswith("step"):
                    break
            children = children_of(parent.pid)
            assert len(children) == 2
            yield parent, children
        finally:
            parent.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")


@LINUX
@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_leaves_no_process(make_recipe, tmp_path, how):
    with running(endless(make_recipe, tmp_path), tmp_path / "run") as (parent, _):
        parent.send_signal(how)
        parent.communicate(timeout=120)  # ends when the last of them does


@LINUX
@pytest.mark.full
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGINT", "SIGTERM", "SIGTERM to a process of the run"])
def test_a_request_to_stop_is_one_line_and_saved(make_recipe, tmp_path, how):
    out = tmp_path / "run"
    with running(endless(make_recipe, tmp_path), out) as (parent, children):
        match how:
            case "Ctrl-C":  # reaches the group of the terminal
                os.killpg(parent.pid, signal.SIGINT)
            case "SIGINT":
                parent.send_signal(signal.SIGINT)
            case "SIGTERM":
                parent.terminate()
            case _:  # the others agree with it
                os.kill(max(children), signal.SIGTERM)
        _, told = parent.communicate(timeout=120)
    [saved] = (out / "checkpoints").glob("step-*")  # beside it is `latest`
    made = int(saved.name.removeprefix("step-"))
    asked = "SIGTERM" if "TERM" in how else "Ctrl-C"
    assert made == len((out / "metrics.jsonl").read_text().splitlines())
    assert (parent.returncode, told) == (
        75,
        f"torchtrain: stopped by {asked} after step {made}; saved: {saved}; continue with --resume\n",
    )
    assert not (out / "logs").exists()


@LINUX
@pytest.mark.full
def test_a_second_ctrl_c_ends_all_at_once(make_recipe, tmp_path):
    with running(endless(make_recipe, tmp_path), tmp_path / "run") as (parent, children):
        for child in children:
            os.kill(child, signal.SIGSTOP)  # none of them can stop by itself
        parent.send_signal(signal.SIGINT)
        time.sleep(1)
        parent.send_signal(signal.SIGINT)
        _, told = parent.communicate(timeout=120)
    assert (parent.returncode, told) == (130, "torchtrain: interrupted; nothing was saved yet\n")


@LINUX
@pytest.mark.full
def test_who_was_killed_is_said(make_recipe, tmp_path):
    with running(endless(make_recipe, tmp_path), tmp_path / "run") as (parent, children):
        os.kill(max(children), signal.SIGKILL)  # the last one started
        _, told = parent.communicate(timeout=120)
    assert parent.returncode == 3
    assert told.startswith(
        "torchtrain: process 1 of 2 was ended by SIGKILL, as the kernel does where memory is full; "
    )
    assert told.count("\n") == 1
