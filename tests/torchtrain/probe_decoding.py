"""How far decoding with a cache is from whole rows, in processes of a launcher; see test_torch_decoding.py.

CASES is a list of recipe files. Of each the leader writes whether it has a cache, how far apart the logits are, also with a
mistake, whether they are the same on all processes, and the loss of an update after decoding and without.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from decoded import apart, both, moved  # noqa: E402
from probing import probe_all  # noqa: E402

from torchtrain import cluster, decoding, step  # noqa: E402
from trainspec.data import open_dataset  # noqa: E402
from trainspec.recipe import load_recipe  # noqa: E402


def probe(file: Path) -> dict[str, Any]:
    recipe = load_recipe(file)
    found: dict[str, Any] = {}
    for key in ("update", "update after"):
        state = moved(step.init_state(cluster.start(recipe)))
        found["is cached"] = step.decoding(state, length=64) is not None
        if key == "update after" and found["is cached"]:
            found |= decoded(state)
        examples = recipe.batch.global_examples
        _, metrics = step.train_step(state, open_dataset(state.run, "train").batch(1, examples), lr=1e-3)
        found[key] = [metrics.loss_sum, metrics.grad_norm]
        cluster.finish()
    return found


def decoded(state: step.State) -> dict[str, Any]:
    found: dict[str, Any] = {"apart": apart(state)}
    shift = decoding.position_shift
    # All positions of a row moved are the same: only those of decoded tokens are.
    with patch.object(decoding, "position_shift", lambda method: shift(method) + 1):
        found["apart of a wrong position"] = apart(state)
    sums = [float(cached.astype("float64").sum()) for cached, _ in both(state)]
    found["same on all"] = len(set(cluster.processes().exchange(json.dumps(sums)))) == 1
    return found


if __name__ == "__main__":
    probe_all(lambda file: probe(Path(file)))
