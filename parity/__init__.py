"""The proof: runs both backends as subprocesses and compares their traces. Imports trainspec only.

For other programs and test suites: `assert_parity` checks a recipe, `Recorder` writes a trace for `parity diff`
(docs/record-a-trace.md), `read_results` reads the output of a check or the matrix. Importing this loads neither framework.
"""

from parity.assertion import assert_parity
from parity.recording.name_map import Join, Split
from parity.recording.recorder import Recorder
from parity.report.verdict import read_results

__all__ = ["Join", "Recorder", "Split", "assert_parity", "read_results"]
