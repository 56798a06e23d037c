"""A share of the long tests: another order of the files for another seed, and nothing is started that may not end in time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from share import NOT_STARTED, USUAL_MINUTES
from small import ROOT

FILES = ("test_a.py", "test_b.py", "test_c.py", "test_d.py")
# Nine minutes are more than the share of six, and nothing at all fits into half a minute.
SUITE = """
import pytest

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def made():
    print("made")


@pytest.mark.full(minutes=9)
def test_long(made):
    pass


@pytest.mark.full(minutes=5)
@pytest.mark.parametrize("n", [1, 2])
def test_that_fits(n):
    pass


def test_usual():
    pass
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("suite")
    for name in FILES:
        (home / name).write_text(SUITE)
    (home / "pytest.ini").write_text("[pytest]\nmarkers = full: takes long\naddopts = --strict-markers\n")
    return home


def ran(home: Path, *words: str) -> tuple[list[str], str]:
    """The tests that passed, as file and name, in their order; and all that was said."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "share",
        "-p",
        "no:cacheprovider",
        "-v",
        "-s",
        "-rs",
        *words,
    ]
    environment = {"PYTHONPATH": str(ROOT / "tests"), "PATH": ""}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split()[0] for line in done.stdout.splitlines() if " PASSED" in line], done.stdout


def test_what_may_not_end_in_time_is_not_started(home: Path):
    passed, said = ran(home, "-m", "full", "--share", "x", "--minutes", "6")
    names = [name.partition("::")[2] for name in passed]
    assert names == ["test_that_fits[1]", "test_that_fits[2]", "test_usual"] * len(FILES)
    assert "made" not in said.split()  # nor what it needs
    assert NOT_STARTED in said
    assert f"{len(FILES)} tests were left to other shares" in said
    passed, said = ran(home, "-m", "full", "--share", "x", "--minutes", f"{USUAL_MINUTES / 2}")
    assert passed == []
    assert f"{4 * len(FILES)} tests were left to other shares" in said


def test_the_order_of_the_files_is_that_of_the_seed(home: Path):
    def files(seed: str) -> list[str]:
        return list(dict.fromkeys(name.partition("::")[0] for name in ran(home, "--share", seed)[0]))

    orders = [files(seed) for seed in ("x", "y", "x")]
    assert all(sorted(order) == sorted(FILES) for order in orders)
    assert orders[0] == orders[2] != orders[1]
