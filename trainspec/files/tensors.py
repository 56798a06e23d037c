"""Writing safetensors files: whole, readable by whom the user lets, and one line where it fails."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file


def save_tensors(
    arrays: Mapping[str, NDArray[Any]], path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `arrays`. Raises OSError, with the path, where the disk does not take them."""
    try:
        save_file(dict(arrays), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise OSError(None, f"not written: {error}", str(path)) from None
    # safetensors makes its files the owner's alone; a run's files are whoever's the user's umask says.
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
