"""The versions of installed packages, and a report of one that is not the version that code was written for."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each of `packages` that is installed, from its metadata: none is imported."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def report_other_version(package: str, installed: str, *, written_for: str, program: str) -> None:
    """Say on stderr, in one line, if `installed` is not `written_for`; a local label such as +cu130 does not count."""
    if installed.partition("+")[0] != written_for:
        print(
            f"{package} {installed} is installed; {program} was written for and tested with {written_for}: "
            f"if a run fails or parity sees a difference, install {package}=={written_for}",
            file=sys.stderr,
        )
