"""A process that keeps the memory it frees writes to the same pages again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Page faults of the second of two blocks that are allocated, written to and freed; larger than any block that glibc would keep.
PROGRAM = """
import ctypes, resource, sys
from trainspec.runs.allocator import keep_freed_memory
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] != "give back":
    keep_freed_memory(in_one_arena=sys.argv[1] == "keep in one arena")
def write():
    before, size = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, 64 * 2**20
    block = library.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
write()
print(write())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_is_kept():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True).stdout)
        for how in ("keep", "keep in one arena", "give back")
    }
    # Of 64 MiB there are 32 pages at least, where they are of the largest size.
    assert faults["give back"] >= 32
    assert max(faults["keep"], faults["keep in one arena"]) < 10
