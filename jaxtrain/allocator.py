"""The C library's allocator, set up for a process that computes on its CPU."""

from __future__ import annotations

import ctypes
import platform

# <malloc.h> of glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_LARGEST = 2**31 - 1
_STEP_BYTES = 256 * 2**20


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next allocation, instead of giving it back.

    XLA's programs for the CPU allocate their scratch memory and their results anew in every update. glibc gives blocks of that size
    back when they are freed, so that every update writes to pages that the system has to clear first: 327,000 of them in a
    step of a model of 28 M parameters, a sixth of its time. The price is that a process holds to its end the most memory that it ever
    had. No effect on other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    c_library = ctypes.CDLL(None)
    for parameter, value in (
        (_ARENA_MAX, 1),
        (_MMAP_MAX, 0),
        (_TRIM_THRESHOLD, _LARGEST),
        (_TOP_PAD, _STEP_BYTES),
    ):
        c_library.mallopt(parameter, value)
