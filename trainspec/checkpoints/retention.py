"""Which checkpoints are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainspec.checkpoints.folders import complete
from trainspec.recipe import Checkpoint as CheckpointSettings


def remove_old(out: Path, settings: CheckpointSettings) -> None:
    """Remove all but the newest `checkpoint.keep`."""
    for old in complete(out)[: -settings.keep]:
        shutil.rmtree(old)
