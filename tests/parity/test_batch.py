"""Many runs, few launches: every run gets a result, whichever process crashes or hangs, and no process stays behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from parity.runs import launch_many as batch
from parity.runs.launch_many import Case, CaseResult, run_cases

# A stand-in for a backend: its first word says what the process of each rank does.
STAND_IN = """
import os, sys, time
from pathlib import Path
RANK = os.environ.get("RANK", "0")
def main(argv):
    what, home = argv
    (Path(home) / f"pid-{what}-{RANK}").write_text(f"{os.getpid()} {os.environ.get('WORLD_SIZE', '1')}")
    if what == "crash" or (what == "crash-of-1" and RANK == "1"):
        raise KeyError(what)
    if what == "die":
        os._exit(3)
    if what == "refuse":
        print("one line", file=sys.stderr)
        return 2
    if what == "wait" or what == "crash-of-1":
        time.sleep(600)
    return 0
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`run("torch", ("pass", 2), ...)`: the results of cases on a stand-in that comes first on the path."""
    for program in ("jaxtrain", "torchtrain"):
        (tmp_path / "path" / program).mkdir(parents=True)
        (tmp_path / "path" / program / "__init__.py").touch()
        (tmp_path / "path" / program / "step.py").touch()
        (tmp_path / "path" / program / "cli.py").write_text(STAND_IN)
    monkeypatch.setattr(batch, "POLL_SECONDS", 0.02)
    monkeypatch.chdir(tmp_path / "path")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent.parent))

    def ends(backend, *cases: tuple[str, int]) -> list[CaseResult]:
        made = [Case((what, str(tmp_path)), devices) for what, devices in cases]
        return run_cases(backend, made, home=tmp_path / "launches")

    yield ends
    for file in tmp_path.glob("pid-*"):
        assert not alive(int(file.read_text().split()[0])), file.name


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def started(tmp_path: Path, what: str) -> dict[str, int]:
    """The process that ran a case, by rank."""
    files = tmp_path.glob(f"pid-{what}-*")
    return {file.name.rsplit("-", 1)[1]: int(file.read_text().split()[0]) for file in files}


def test_jax_takes_all_in_one_process_and_keeps_the_order(run, tmp_path: Path):
    ended = run("jax", ("pass", 1), ("refuse", 8), ("crash", 2), ("again", 1))
    assert [each.code for each in ended] == [0, 2, 70, 0]
    assert [each.wrong for each in ended] == [None, "one line", "KeyError: 'crash'", None]
    assert (
        len(
            {pid for what in ("pass", "refuse", "crash", "again") for pid in started(tmp_path, what).values()}
        )
        == 1
    )


def test_a_process_that_dies_takes_one_run_with_it(run, tmp_path: Path):
    ended = run("jax", ("pass", 1), ("die", 1), ("again", 1))
    assert [each.code for each in ended] == [0, 70, 0]
    assert "died with exit code 3" in str(ended[1].wrong)
    assert started(tmp_path, "pass") != started(tmp_path, "again")


def test_a_run_that_waits_is_ended(run, monkeypatch):
    monkeypatch.setattr(batch, "SILENCE_SECONDS", 3.0)
    ended = run("jax", ("wait", 1), ("pass", 1))
    assert [each.code for each in ended] == [70, 0]
    assert "did not end within 3 seconds" in str(ended[0].wrong)


def test_one_of_several_processes_that_crashes_ends_the_others(run, tmp_path: Path):
    began = time.monotonic()
    ended = run("torch", ("one", 1), ("pass", 2), ("crash-of-1", 2))
    assert [each.code for each in ended] == [0, 0, 70]
    assert ended[2].wrong == "KeyError: 'crash-of-1'"
    assert (set(started(tmp_path, "one")), set(started(tmp_path, "pass"))) == ({"0"}, {"0", "1"})
    assert time.monotonic() - began < 120
