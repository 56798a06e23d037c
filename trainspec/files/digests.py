"""The digest of a file, made by several threads: a file has many times as many bytes as a core hashes in a second.

A file is cut into parts. Its digest is the hash of the hashes of its parts, one after the other; that of a file of one part is the
hash of the file. The hash is BLAKE3 where the package is installed, and the digest says so: `blake3:` and the number. A number
alone is SHA-256 (docs/decisions/0038-digests.md).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from typing import Any

from trainspec.cores import cores
from trainspec.errors import RecipeError

try:
    from blake3 import blake3
except ImportError:  # it is an extra
    blake3 = None

PART_BYTES = 2**20
# More would wait for the disk.
THREADS = min(8, cores())
# So much is read before it is hashed: it stays in a core's cache.
_PIECE_BYTES = 512 * 2**10


# The hash of new digests; `hash_of` makes one.
SHA256, BLAKE3 = "sha256", "blake3"
ALGORITHM = SHA256 if blake3 is None else BLAKE3


def hash_of(algorithm: str) -> Callable[[], Any]:
    """What makes a new hash. Raises RecipeError where its package is not installed, and ValueError where there is none of this name."""
    if algorithm == SHA256:
        return hashlib.sha256
    if algorithm != BLAKE3:
        raise ValueError(f"no digest {algorithm!r}")
    if blake3 is None:
        raise RecipeError(
            "its digests are of BLAKE3, which is not installed; pip install 'twintrain[digests]'"
        )
    return blake3


def algorithm_of(digest: str) -> str:
    """The hash of a recorded digest."""
    name, colon, _ = digest.partition(":")
    return name if colon else SHA256


def joined_digest(parts: Sequence[bytes], algorithm: str) -> str:
    """The digest of a file whose parts have these."""
    whole = parts[0]
    if len(parts) > 1:
        joined = hash_of(algorithm)()
        joined.update(b"".join(parts))
        whole = joined.digest()
    return whole.hex() if algorithm == SHA256 else f"{algorithm}:{whole.hex()}"


def digest_of(file: BufferedReader, part_bytes: int | None = PART_BYTES, algorithm: str | None = None) -> str:
    """The digest of an open file. `part_bytes` None: the SHA-256 of the whole, as versions recorded that had no parts.

    Raises as `hash_of`.
    """
    if part_bytes is None:
        return hashlib.file_digest(file, "sha256").hexdigest()
    algorithm = algorithm or ALGORITHM
    begin = hash_of(algorithm)
    descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
    begins = range(0, max(1, size), part_bytes)
    threads = min(THREADS, len(begins))

    def every(first: int) -> list[bytes]:
        """The digests of this part and of each that comes so many threads later."""
        buffer = memoryview(bytearray(min(_PIECE_BYTES, part_bytes)))
        return [_digest_of_part(begin(), descriptor, at, part_bytes, buffer) for at in begins[first::threads]]

    if threads == 1:
        return joined_digest(every(0), algorithm)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(every, range(threads)))
    return joined_digest(
        [found[number % threads][number // threads] for number in range(len(begins))], algorithm
    )


def _digest_of_part(digest: Any, descriptor: int, at: int, part_bytes: int, buffer: memoryview) -> bytes:
    end = at + part_bytes
    while at < end and (count := os.preadv(descriptor, [buffer[: end - at]], at)):
        digest.update(buffer[:count])
        at += count
    return digest.digest()
