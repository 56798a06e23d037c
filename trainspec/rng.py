"""Counter-based random bits: a value is a function of (key, counter), never of what was drawn before.

Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). It needs
only 32-bit add, rotate and xor, which numpy, JAX and torch all have. This is the numpy reference; the backends'
`dropout.py` run the same rounds on their own arrays and are tested against it bit by bit.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY_CONSTANT = 0x1BD11BDA
UInt32 = NDArray[np.uint32]


def threefry2x32(key: tuple[int, int], counter0: UInt32, counter1: UInt32) -> tuple[UInt32, UInt32]:
    """64 random bits per pair of counters (arrays of equal shape), as two 32-bit words."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ PARITY_CONSTANT)
    with np.errstate(over="ignore"):
        x0 = counter0.astype(np.uint32) + np.uint32(keys[0])
        x1 = counter1.astype(np.uint32) + np.uint32(keys[1])
        for block in range(5):
            for rotation in ROTATIONS[block % 2]:
                x0 = x0 + x1
                x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
                x1 = x0 ^ x1
            x0 = x0 + np.uint32(keys[(block + 1) % 3])
            x1 = x1 + np.uint32((keys[(block + 2) % 3] + block + 1) & 0xFFFFFFFF)
    return x0, x1


def name_key(seed: int, *names: str) -> tuple[int, int]:
    """A 64-bit key for (seed, names), as two 32-bit words."""
    digest = hashlib.sha256("\x00".join((str(seed), *names)).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def fold(key: tuple[int, int], number: int) -> tuple[int, int]:
    """The key for `number` (a step, say) under `key`."""
    x0, x1 = threefry2x32(key, np.array([number], np.uint32), np.array([0], np.uint32))
    return int(x0[0]), int(x1[0])


def drop_threshold(rate: float) -> int:
    """The 32-bit threshold below which a random word drops its element."""
    return round(rate * 2**32)
