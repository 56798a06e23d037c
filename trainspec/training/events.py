"""TensorBoard events of a run: numbers and texts in one file, by tensorboard's own writer.

tensorboardX would import torch, where it is installed, into JAX's process; `tensorboard.summary.Writer` has no texts.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class Events:
    """The events of a run that is written to the directory `out`."""

    def __init__(self, out: Path) -> None:
        self._writer = EventFileWriter(str(out))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A number of a step."""
        self._add(scalar_pb(name, value), step)

    def text(self, name: str, markdown: str, step: int) -> None:
        """A text of a step, which TensorBoard shows as Markdown."""
        self._add(text_pb(name, markdown), step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _add(self, summary: Any, step: int) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
