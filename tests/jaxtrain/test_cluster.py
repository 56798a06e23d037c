"""Several processes are one run whatever the plan is; a cluster that is described wrongly is one line."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import launch
from small import QA, ROOT

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@pytest.fixture
def recipe_file(model_dirs, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"""
model: {{from: {model_dirs["plain"]}}}
method: {{kind: full}}
data: {{train: {QA}, heldout: {QA.with_name("qa-heldout.jsonl")}, sequence_tokens: 160, cache: {tmp_path}/cache}}
batch: {{global_examples: 8}}
run: {{steps: 4}}
""")
    return file


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def results(outs: list[Path]) -> list[dict]:
    return [json.loads(out.read_text()) for out in outs]


def test_a_cluster_described_wrongly_is_one_line(recipe_file, tmp_path):
    train = ["train", str(recipe_file), "--out", str(tmp_path / "out")]
    address = f"127.0.0.1:{closed_port()}"
    wrong = {
        "half": ({"JAX_NUM_PROCESSES": "2"}, "set JAX_COORDINATOR_ADDRESS"),
        "words": (dict(zip(NAMES, (address, "x", "1"), strict=True)), "give HOST:PORT"),
        "no-port": (dict(zip(NAMES, ("node", "2", "1"), strict=True)), "give HOST:PORT"),
        "too-high": (dict(zip(NAMES, (address, "2", "2"), strict=True)), "a number below that"),
        "nobody": (dict(zip(NAMES, (address, "2", "1"), strict=True)), f"nobody answers at {address}"),
        "slurm": (dict(zip(SLURM, ("7", "no-node.invalid", "2", "1", "0"), strict=True)), "no-node.invalid"),
        "slurm-words": (dict(zip(SLURM, ("7", "node", "x", "1", "0"), strict=True)), "JAX_NUM_PROCESSES=1"),
    }
    cases = {name: {"argv": train, "environment": environment} for name, (environment, _) in wrong.items()}
    [found] = results(launch("run_commands.py", cases, tmp_path / "scratch"))
    for name, (_, words) in wrong.items():
        assert found[name]["code"] == 2, (name, found[name])
        assert len(found[name]["err"].splitlines()) == 1
        assert words in found[name]["err"], (name, found[name])
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_two_processes_have_one_leader(recipe_file, tmp_path):
    """With a plan for one device as well: each would else train on its own, and write the same files."""
    out = str(tmp_path / "out")
    command = [str(recipe_file), "--out", out]
    cases = {
        "train": {"argv": ["train", *command]},
        "eval": {"argv": ["eval", *command, "--loss-only", "--untrained", "--set", "plan.data=8"]},
        "export": {"argv": ["export", *command]},
    }
    leader, follower = results(launch("run_commands.py", cases, tmp_path / "scratch", processes=2))
    for found in (leader, follower):
        assert found["train"]["code"] == 2
        assert "2 process(es) have 8" in found["train"]["err"]
        assert len(found["train"]["err"].splitlines()) == 1
        assert found["eval"]["code"] == 0, found["eval"]
    assert leader["eval"]["out"].startswith("held-out loss")
    assert not follower["eval"]["out"]
    # There is no checkpoint yet: the one that exports says so.
    assert (leader["export"]["code"], follower["export"]["code"]) == (2, 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_exchange_texts_of_any_length(tmp_path, processes):
    texts = {
        "equal": ["abc", "xyz"],
        "lengths": ["a", "b" * 70_000],
        "empty": ["", ""],
        "one-empty": ["", "only one"],
        "not-ascii": ["schließen Sie – 检查点 🧊", "é"],
        "null": ["\0a", "\0"],
    }
    found = results(launch("run_exchange.py", {"texts": texts}, tmp_path, processes=processes))
    assert [(each["index"], each["count"]) for each in found] == [(i, processes) for i in range(processes)]
    expected = {name: of_each[:processes] for name, of_each in texts.items()}
    assert all(each["texts"] == expected for each in found)


@pytest.mark.full
def test_the_leader_says_once_that_jax_is_another_version(recipe_file, tmp_path):
    command = ["train", str(recipe_file), "--out", str(tmp_path / "out")]
    cases = {name: {"argv": command, "jax_version": "0.0.1"} for name in ("first", "second")}
    [alone] = results(launch("run_commands.py", cases, tmp_path / "alone"))
    said = alone["first"]["err"].splitlines()[0]
    assert said.startswith("jax 0.0.1 is installed; jaxtrain was written for and tested with ")
    assert said not in alone["second"]["err"]
    # One command: with two, one process could be a command ahead of the other. In another directory, or it would be refused.
    one = {"first": cases["first"] | {"argv": [*command[:-1], str(tmp_path / "two")]}}
    leader, follower = results(launch("run_commands.py", one, tmp_path / "scratch", processes=2))
    assert leader["first"]["err"].splitlines()[0] == said
    assert said not in follower["first"]["err"]


@pytest.mark.full
def test_a_process_that_failed_does_not_wait_for_those_that_wait_for_it(recipe_file, tmp_path):
    """JAX's own end would, for five minutes, and all that time nobody would know."""
    out, address = tmp_path / "out", f"127.0.0.1:{closed_port()}"
    command = [sys.executable, "-m", "jaxtrain", "train", str(recipe_file), "--out", str(out)]
    command += ["--set", "plan.data=2", "--set", "checkpoint.every_steps=2", "--set", "run.steps=4"]
    plant = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/planted"), str(ROOT)]),
        "PLANTED_IN": "1",
        "PLANTED": "from trainspec.errors import DataError; raise DataError('line 7: no record')",
    }
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | plant | dict(zip(NAMES, (address, "2", str(number)), strict=True)) | {"JAX_PLATFORMS": "cpu"},
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        told = processes[1].communicate(timeout=240)[1].splitlines()
        ended = time.monotonic()
        leader = processes[0].communicate(timeout=60)[1].splitlines()
    finally:
        for process in processes:
            process.kill()
    assert time.monotonic() - ended < 30
    saved = f"saved: {out}/checkpoints/step-000002; continue with --resume"
    assert processes[1].returncode == 2
    assert told[-1].startswith("jaxtrain: line 7: no record")
    # The one whose connection broke says no more than that, and not that it was a user's mistake.
    assert processes[0].returncode == 3
    assert leader[-1].startswith("jaxtrain: ")
    assert "onnection" in leader[-1]
    assert leader[-1].endswith(f"; {saved}")
    assert not [line for line in (*told, *leader) if line.startswith("Traceback")]


LEAVES = """
import atexit, os, sys, threading
from concurrent.futures import ThreadPoolExecutor
from jaxtrain import cluster
ThreadPoolExecutor(1).submit(threading.Event().wait, 3)
cluster._at_exit(lambda: print("left", flush=True))
atexit.register(print, "waited", flush=True)
threading.Timer(1, print, ["threads are waited for"], {"flush": True}).start()
"""


def test_a_process_that_failed_leaves_before_its_threads_are_waited_for():
    """As one of orbax's may wait for a process that is gone, until JAX ends this one with a stack."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVES], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["left", "threads are waited for", "waited"]
