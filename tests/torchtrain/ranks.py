"""Many command lines of torchtrain in processes that are started once, as a launcher starts them.

    python -m torch.distributed.run --nproc-per-node N tests/torchtrain/ranks.py CASES.json RESULTS.json

CASES is [{"argv": [...], "edits": [{"module": ..., "old": ..., "new": ...}]}, ...]; the leader writes RESULTS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from parity.plant import Edit, run_case  # noqa: E402
from trainspec.recipe import Recipe  # noqa: E402
from trainspec.trace import Trace  # noqa: E402


def train_all(
    recipes: dict[str, Recipe], home: Path, *, processes: int, edits: dict[str, Edit] | None = None
) -> None:
    """Called by tests: leaves a trace, activations included, under HOME/NAME/trace for every recipe."""
    home.mkdir(parents=True, exist_ok=True)
    cases = []
    for name, recipe in recipes.items():
        file = home / f"{name}.yaml"
        file.write_text(recipe.to_yaml())
        argv = ["train", str(file), "--out", str(home / name / "run"), "--trace", str(home / name / "trace")]
        planted = [vars(edits[name])] if edits and name in edits else []
        cases.append({"argv": [*argv, "--activations", "1"], "edits": planted})
    run(Path(__file__), cases, home, processes=processes)
    for name, result in zip(recipes, json.loads((home / "results.json").read_text()), strict=True):
        assert result["code"] == 0, f"{name}: {result['err'][-3000:]}"


def run(script: Path, cases: list[Any], home: Path, *, processes: int, timeout: float = 900) -> None:
    """Run a script that takes CASES and RESULTS in that many processes; one needs no launcher."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += [str(script), str(home / "cases.json"), str(home / "results.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def furthest(left: Path, right: Path, group: str, *, step: int) -> float:
    """The largest difference of any tensor of the group, as a share of its largest entry on the left."""
    one, other = Trace(left), Trace(right)
    names = [name for name in one.names(step) if name.startswith(f"{group}/")]
    assert names
    assert set(one.names(step)) == set(other.names(step))
    found = 0.0
    for name in names:
        mine, theirs = (np.asarray(t.read(step, name), np.float64) for t in (one, other))
        assert mine.shape == theirs.shape
        found = max(found, float(np.abs(mine - theirs).max() / max(np.abs(mine).max(), 1e-300)))
    return found


def losses(trace: Path) -> list[float]:
    return [row["loss"] for row in Trace(trace).rows]


def main() -> None:
    cases, results = map(Path, sys.argv[1:])
    found = [
        run_case("torchtrain", case["argv"], [Edit(**edit) for edit in case["edits"]])
        for case in json.loads(cases.read_text())
    ]
    if os.environ.get("RANK", "0") == "0":
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
