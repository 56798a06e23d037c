"""What a pipeline does beside training, in processes of a launcher; see test_torch_pipeline.py.

CASES is a list of one recipe file. The leader writes the logits of a number of examples that the microbatches do not
divide, what its step sends, whether a refused update changed no process's weights, and how many process groups there are
after each of two runs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from torchtrain import cluster, cost, step  # noqa: E402
from trainspec.data import Batch, open_dataset  # noqa: E402
from trainspec.errors import NonFiniteLossError  # noqa: E402
from trainspec.recipe import Recipe, load_recipe  # noqa: E402
from trainspec.runs.run import resolve  # noqa: E402

ODD_EXAMPLES = 3


def held_weights(state: step.State) -> list[torch.Tensor]:
    return [p.detach().clone() for p in state.model.parameters() if not p.is_meta]


def refused(state: step.State, batch: Batch) -> bool:
    """Whether a loss that is no number stops the update, everywhere, and leaves all weights as they were."""
    token_loss, before = step.token_loss, held_weights(state)

    def infinite(*args, **more):
        loss, tokens = token_loss(*args, **more)
        return loss * torch.inf, tokens

    with patch.object(step, "token_loss", infinite):
        try:
            step.train_step(state, batch, lr=1.0)
        except NonFiniteLossError:
            is_same = all(map(torch.equal, before, held_weights(state)))
            answers: list[bool] = [False] * dist.get_world_size()
            dist.all_gather_object(answers, is_same)
            return all(answers)
    return False


def probe(recipe: Recipe, logits_file: Path) -> dict[str, object]:
    cluster.start(recipe)
    state = step.init_state(resolve(recipe))
    dataset = open_dataset(resolve(recipe), "train")
    batch = dataset.batch(0, recipe.batch.global_examples)
    logits = step.logits(state, dataset.batch(0, ODD_EXAMPLES))
    if cluster.is_leader():
        logits.tofile(logits_file)
    moved = [asdict(collective) for collective in cost.moved(state, batch)]
    is_refused = refused(state, batch)
    cluster.finish()
    return {"moved": moved, "refused": is_refused, "groups": len(_world.pg_map)}


def main() -> None:
    cases, results = map(Path, sys.argv[1:])
    (file,) = json.loads(cases.read_text())
    probed = [probe(load_recipe(Path(file)), results.with_suffix(".logits")) for _ in range(2)]
    if cluster.is_leader():
        results.write_text(json.dumps(probed))


if __name__ == "__main__":
    main()
