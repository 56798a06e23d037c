"""The formats of a run's checkpoints: it writes the one that its recipe names, and reads both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic

from trainspec.checkpoints.copies import Copies
from trainspec.checkpoints.identity import Identity
from trainspec.checkpoints.manifest import NATIVE, read_manifest
from trainspec.checkpoints.portable import PortableFormat
from trainspec.checkpoints.states import ArrayFormat, S, States
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run


class Formats(Generic[S]):
    """Writes in the format of `run`'s recipe; reads each checkpoint in the one that its manifest names."""

    def __init__(
        self, backend: States[S], run: Run, processes: Processes, *, identity: Identity | None = None
    ) -> None:
        self._backend, self._run, self._processes, self._identity = backend, run, processes, identity
        self._copies = Copies()
        self.name: str = run.recipe.checkpoint.format

    def prepare(self, state: S) -> None:
        """As `ArrayFormat.prepare`."""
        self._format(self.name).prepare(state)

    def begin(self, folder: Path, state: S) -> Callable[[], dict[str, str]]:
        """As `ArrayFormat.begin`."""
        return self._format(self.name).begin(folder, state)

    def restore(self, state: S, path: Path) -> S:
        """As `ArrayFormat.restore`."""
        return self._format(read_manifest(path).format).restore(state, path)

    def _format(self, name: str) -> ArrayFormat[S]:
        if name == NATIVE:
            return self._backend.native_format(self._run, self._processes)
        return PortableFormat(
            self._backend, self._run, self._processes, identity=self._identity, copies=self._copies
        )
