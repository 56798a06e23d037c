"""Several processes are one run whatever the plan is; a cluster that is described wrongly is one line."""

import json
import socket
from pathlib import Path

import pytest
from launch import launch
from small import QA

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


def test_two_processes_have_one_leader(recipe_file, tmp_path):
    """With a plan for one device as well: each would else train on its own, and write the same files."""
    out = str(tmp_path / "out")
    command = [str(recipe_file), "--out", out]
    cases = {
        "train": {"argv": ["train", *command]},
        "eval": {"argv": ["eval", *command, "--set", "plan.data=8"]},
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
