"""What a Recorder states of its run in trace.json: what the user told it, versions, and digests of weights and batches."""

from __future__ import annotations

import sys
from dataclasses import replace
from hashlib import sha256
from typing import get_args

import numpy as np

from parity.recording.name_map import Arrays
from trainspec.errors import TraceError, nearest
from trainspec.plans.plan import Policy
from trainspec.trace_header import OrderOrigin, TraceHeader
from trainspec.versions import installed_versions

# Packages whose versions can change a program's numbers; the header has those that the program has imported.
PACKAGES = (
    "accelerate", "deepspeed", "equinox", "flax", "jax", "jaxlib", "keras", "numpy", "optax", "tensorflow", "torch",
    "transformers",
)  # fmt: skip


class RecordedHeader:
    """The header of a recording; `current` changes with every batch.

    Raises TraceError for an argument that is not what it says.
    """

    def __init__(self, program: str | None, precision: Policy | None, first_step: int) -> None:
        policies = get_args(Policy)
        if precision is not None and precision not in policies:
            raise TraceError(
                f"precision: {precision!r} is none of {', '.join(policies)}{nearest(str(precision), policies)}"
            )
        if program is not None and not (isinstance(program, str) and program):
            raise TraceError(f"program: {program!r} is no name; give a text, or leave it out")
        if isinstance(first_step, bool) or not isinstance(first_step, int) or first_step < 1:
            raise TraceError(f"first_step: {first_step!r} is no step; give a whole number from 1 on")
        self.current = TraceHeader(policy=precision, backend=program, first_step=first_step)
        self._batches = sha256()

    def started(self, weights: Arrays, order: OrderOrigin | None) -> TraceHeader:
        """The header before the first update, with the versions of what the program has imported."""
        identity = {"weights": _digest(weights).hex()}
        self.current = replace(
            self.current,
            versions=installed_versions(name for name in PACKAGES if name in sys.modules),
            identity=identity,
            order=order,
        )
        return self.current

    def fed(self, batch: Arrays) -> TraceHeader:
        """The header after one more batch."""
        self._batches.update(_digest(batch))
        identity = {**self.current.identity, "data": self._batches.hexdigest()}
        self.current = replace(self.current, identity=identity)
        return self.current


def _digest(arrays: Arrays) -> bytes:
    """SHA-256 of names, shapes and values; a number is the same in every type that holds it."""
    total = sha256()
    for name, array in sorted(arrays.items()):
        values = np.ascontiguousarray(array.astype(np.float64)) + 0.0  # -0 is 0
        total.update(f"{name} {list(array.shape)}".encode())
        total.update(values.tobytes())
    return total.digest()
