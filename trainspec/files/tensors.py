"""Writing safetensors files: completely or not at all, and with the permissions of the user's umask.

`write_tensors` holds one tensor in memory at a time; `save_tensors` is the library's own writer, which copies all of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from trainspec.weight import WeightLike

# The types that weights may be stored in: safetensors' names and numpy's.
FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}


def save_tensors(
    arrays: Mapping[str, NDArray[Any]], path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `arrays`. Raises OSError with the path, and leaves no file, where the disk fails."""
    try:
        save_file(dict(arrays), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise OSError(None, f"not written: {error}", str(path)) from None
    # safetensors makes its files readable by the owner only; the user's umask should decide.
    path.chmod(0o666 & ~_umask())


def write_tensors(
    arrays: Mapping[str, WeightLike], path: Path, *, metadata: Mapping[str, str] | None = None
) -> str:
    """Write `arrays` one after the other and flush them to the disk; returns the SHA-256 of the file.

    Raises OSError with the path, and leaves no file, where the disk fails. The layout is that of safetensors' own writer:
    wider types first, then by name.
    """
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        array, begin = arrays[name], end
        end += math.prod(array.shape) * array.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            for data in (len(text).to_bytes(8, "little"), text):
                file.write(data)
                digest.update(data)
            for name in names:
                data = np.ascontiguousarray(arrays[name][...]).reshape(-1).view(np.uint8).data
                file.write(data)
                digest.update(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or "not written", str(path)) from None
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
