"""A package whose private names are used is written for one version: another that is installed is reported."""

from __future__ import annotations

import sys


def report_other_version(package: str, installed: str, *, written_for: str, program: str) -> None:
    """Say on stderr, in one line, if `installed` is not `written_for`; a local label such as +cu130 does not count."""
    if installed.partition("+")[0] != written_for:
        print(
            f"{package} {installed} is installed; {program} was written for and tested with {written_for}: "
            f"if a run fails or parity sees a difference, install {package}=={written_for}",
            file=sys.stderr,
        )
