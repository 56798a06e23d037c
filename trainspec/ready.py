"""A process that is set up for a run, whichever backend it is of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from trainspec.contract import Cluster
from trainspec.failures import explained
from trainspec.runs.run import Run


@contextmanager
def ready(cluster: Cluster, run: Run, *, out: Path | None = None) -> Iterator[None]:
    """Inside, the process is set up for a run, and cleaned up after it. Errors say what helps, and what is saved in `out`."""
    with explained(run, partial(cluster.describe_devices, run.recipe.plan), out=out):
        cluster.set_up(run)
        try:
            yield
        finally:
            cluster.finish()
