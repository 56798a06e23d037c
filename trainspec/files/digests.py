"""The digest of a file, made by several threads: a file has many times as many bytes as a core hashes in a second.

A file is cut into parts. Its digest is the SHA-256 of the SHA-256s of its parts, one after the other; that of a file of one part is
the SHA-256 of the file (docs/decisions/0038-digests.md).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader

from trainspec.cores import cores

PART_BYTES = 2**20
# More would wait for the disk.
THREADS = min(8, cores())
# So much is read before it is hashed: it stays in a core's cache.
_PIECE_BYTES = 512 * 2**10


def joined_digest(parts: Sequence[bytes]) -> str:
    """The digest of a file whose parts have these."""
    return (parts[0] if len(parts) == 1 else hashlib.sha256(b"".join(parts)).digest()).hex()


def digest_of(file: BufferedReader, part_bytes: int | None = PART_BYTES) -> str:
    """The digest of an open file. `part_bytes` None: the SHA-256 of the whole, as versions recorded that had no parts."""
    if part_bytes is None:
        return hashlib.file_digest(file, "sha256").hexdigest()
    descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
    begins = range(0, max(1, size), part_bytes)
    threads = min(THREADS, len(begins))

    def every(first: int) -> list[bytes]:
        """The digests of this part and of each that comes so many threads later."""
        buffer = memoryview(bytearray(min(_PIECE_BYTES, part_bytes)))
        return [_digest_of_part(descriptor, at, part_bytes, buffer) for at in begins[first::threads]]

    if threads == 1:
        return joined_digest(every(0))
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(every, range(threads)))
    return joined_digest([found[number % threads][number // threads] for number in range(len(begins))])


def _digest_of_part(descriptor: int, at: int, part_bytes: int, buffer: memoryview) -> bytes:
    digest, end = hashlib.sha256(), at + part_bytes
    while at < end and (count := os.preadv(descriptor, [buffer[: end - at]], at)):
        digest.update(buffer[:count])
        at += count
    return digest.digest()
