"""Runs that are killed and stopped at random moments, as a user starts them. More of it: scripts/kill_campaign.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small import ROOT

CAMPAIGN = ROOT / "scripts/kill_campaign.py"


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("program", "processes", "kills", "stops"),
    [("jaxtrain", 1, 8, 6), ("torchtrain", 1, 8, 6), ("torchtrain", 2, 8, 3)],
)
def test_nothing_is_lost_but_the_updates_since_the_last_checkpoint(
    program: str, processes: int, kills: int, stops: int, tmp_path: Path
):
    """What is wrong is judged by the script: whole checkpoints, few updates lost, the same end, nothing left over."""
    done = subprocess.run(
        [sys.executable, CAMPAIGN, tmp_path, "--program", program, "--processes", str(processes),
         "--kills", str(kills), "--stops", str(stops)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    counts = seen["counts"]
    assert not seen["wrong"]
    assert counts["kills of all"] + counts.get("kills of one process", 0) == kills
    assert (counts.get("kills of one process", 0) > 0) == (processes > 1)
    assert counts["kills inside a save"] >= kills // 3
    assert counts["stopped and saved"] == stops
    assert counts["runs continued to their end"] >= 2
