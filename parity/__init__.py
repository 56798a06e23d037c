"""The proof: runs both backends as subprocesses and compares their traces. Imports trainspec only.

For other programs and test suites: `assert_parity` checks a recipe, `Recorder` writes a trace that `parity diff` reads
(docs/record-a-trace.md). Importing this loads neither framework.
"""

from parity.assertion import assert_parity
from parity.record import Recorder

__all__ = ["Recorder", "assert_parity"]
