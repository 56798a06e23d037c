"""`parity.runs.forked`: every process knows its rank, and the first that fails ends the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
WRITES = """
import os, sys
from pathlib import Path
import light.step
Path(sys.argv[1], os.environ["RANK"]).write_text(f"{os.environ['WORLD_SIZE']} {light.step.LOADED_BY} {os.getppid()}")
"""
FAILS = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
if os.environ["RANK"] == "1":
    raise SystemExit(3)
time.sleep(600)
"""


@pytest.fixture
def start(tmp_path):
    """Start a script in three processes; the program that they load is empty."""
    (tmp_path / "light").mkdir()
    (tmp_path / "light" / "__init__.py").touch()
    (tmp_path / "light" / "step.py").write_text("import os\nLOADED_BY = os.getpid()\n")
    (tmp_path / "out").mkdir()

    def run(script: str) -> subprocess.Popen[bytes]:
        (tmp_path / "script.py").write_text(script)
        command = [sys.executable, "-m", "parity.runs.forked", "3", "light", str(tmp_path / "script.py")]
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        return subprocess.Popen([*command, str(tmp_path / "out")], env=os.environ | {"PYTHONPATH": path})

    return run


def said(directory: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in directory.iterdir()}


def test_each_process_knows_its_rank_and_the_program_is_loaded_once(start, tmp_path):
    launch = start(WRITES)
    assert launch.wait(timeout=60) == 0
    assert said(tmp_path / "out") == {str(rank): f"3 {launch.pid} {launch.pid}" for rank in range(3)}


def test_the_first_that_fails_ends_the_others(start, tmp_path):
    assert start(FAILS).wait(timeout=60) == 3
    assert len(said(tmp_path / "out")) >= 1
    for process in said(tmp_path / "out").values():
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


def test_a_terminated_launch_leaves_no_process(start, tmp_path):
    launch = start(FAILS.replace("raise SystemExit(3)", "pass"))
    until = time.monotonic() + 60
    while len(list((tmp_path / "out").iterdir())) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)  # the last has written its number
    launch.terminate()
    assert launch.wait(timeout=60) != 0
    processes = said(tmp_path / "out").values()
    assert len(processes) == 3
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)
