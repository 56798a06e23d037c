"""Writing safetensors files: completely or not at all, and with the permissions of the user's umask."""

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
    """Write `arrays`. Raises OSError with the path, and leaves no file, where the disk fails."""
    try:
        save_file(dict(arrays), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise OSError(None, f"not written: {error}", str(path)) from None
    # safetensors makes its files readable by the owner only; the user's umask should decide.
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
