"""A process that ends with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from trainspec.errors import EXIT_CRASHED

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Loaded here, not between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, also where nothing else of the parent could."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was asked
            os._exit(EXIT_CRASHED)
