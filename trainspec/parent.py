"""Ends a process with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from trainspec.errors import EXIT_CRASHED

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Loaded at import, not between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends, however that ends. Linux only; elsewhere it does nothing."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before the call
            os._exit(EXIT_CRASHED)
