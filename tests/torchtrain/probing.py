"""What the programs that probe a run have in common: each is started once for each process of a group."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchtrain import cluster


def probe_all(probe: Callable[[Any], Any]) -> None:
    """Probe every case of the file named first on the command line; the leader writes what was found into the second."""
    cases, results = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    probed = [probe(case) for case in json.loads(cases.read_text())]
    if cluster.is_leader():
        results.write_text(json.dumps(probed))
