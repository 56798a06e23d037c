"""A share of the tests for whoever has not the time for all of them: some files first, others another time.

    pytest -m full --share SEED --minutes 8

SEED decides in which order the files come, so that over a few of them every file has its turn. A test that may not end within
the minutes is not started, and shorter ones still are: `pytest.mark.full(minutes=3)` says what a test may take on two cores
that others use as well, with what is made before it; one minute where it says nothing. How many were not started is told at
the end.
"""

from __future__ import annotations

import hashlib
import time

import pytest

NOT_STARTED = "not started: it may take longer than what is left of this share's minutes"
USUAL_MINUTES = 1.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("share")
    group.addoption("--share", metavar="SEED", help="the order of the test files, as a seed")
    group.addoption(
        "--minutes", type=float, metavar="N", help="start no test that may not end within N minutes"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STARTED] = time.monotonic()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("--share")
    if seed is not None:
        items.sort(key=lambda item: _turn(seed, item.path.name))  # stable: a file's tests keep their order


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Before fixtures are made: those are what takes long.
    minutes = item.config.getoption("--minutes")
    if minutes is None:
        return
    passed = (time.monotonic() - item.config.stash[_STARTED]) / 60
    if passed + minutes_of(item) > minutes:
        pytest.skip(NOT_STARTED)


def minutes_of(item: pytest.Item) -> float:
    """What a test may take, by its nearest mark."""
    mark = item.get_closest_marker("full")
    return mark.kwargs.get("minutes", USUAL_MINUTES) if mark else USUAL_MINUTES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    not_started = [report for report in skipped if NOT_STARTED in str(report.longrepr)]
    if not_started:
        terminalreporter.write_line(f"{len(not_started)} tests were left to other shares")


def _turn(seed: str, name: str) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


_STARTED = pytest.StashKey[float]()
