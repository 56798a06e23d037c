"""The proof: runs both backends as subprocesses and compares their traces. Imports trainspec only.

For other programs and test suites: `assert_parity` checks a recipe, `Recorder` writes a trace for `parity diff`
(docs/record-a-trace.md), `read_results` reads the output of a check or the matrix. Importing this loads neither framework,
and nothing else before a name is used: the command line is in this package, too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.assertion import assert_parity
    from parity.recording.name_map import Join, Split
    from parity.recording.recorder import Recorder
    from parity.report.verdict import read_results

__all__ = ["Join", "Recorder", "Split", "assert_parity", "read_results"]
_HOMES = {
    "Join": "parity.recording.name_map",
    "Recorder": "parity.recording.recorder",
    "Split": "parity.recording.name_map",
    "assert_parity": "parity.assertion",
    "read_results": "parity.report.verdict",
}


def __getattr__(name: str) -> Any:
    """One of the public names, from the module that it is in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
