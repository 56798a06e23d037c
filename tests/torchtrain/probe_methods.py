"""What a process holds of a method's training state, in processes of a launcher; see test_torch_methods.py.

CASES is a list of recipe files. Of each the leader writes, for all processes: the frozen weights that have a gradient
after a step's passes, how many numbers the optimizer has a moment of, and whether the weights that all stages have are
the same bits on each after two updates.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from probing import probe_all  # noqa: E402

from torchtrain import cluster, step  # noqa: E402
from torchtrain.weights import canonical_name  # noqa: E402
from trainspec.data import Batch, open_dataset  # noqa: E402
from trainspec.methods import trainable_table  # noqa: E402
from trainspec.plans.pipeline import stages_of  # noqa: E402
from trainspec.recipe import load_recipe  # noqa: E402
from trainspec.runs.run import resolve  # noqa: E402


def gradients_of_frozen(state: step.State, batch: Batch) -> list[str]:
    """Names of frozen weights that have one when the update comes; consumes `state`."""
    names: list[str] = []
    update = state.engine.step

    def look() -> None:
        for name, parameter in state.model.named_parameters():
            if parameter.grad is not None and not parameter.requires_grad:
                names.append(name)
        update()

    with patch.object(state.engine, "step", look):
        step.train_step(state, batch, lr=1e-3)
    return names


def shared_alike(state: step.State) -> bool:
    """Whether each weight of several stages is the same on all of them."""
    recipe, spec, stages = state.run.recipe, state.run.spec, state.mesh.stages
    parameters = {canonical_name(name): p for name, p in state.model.named_parameters()}
    alike = True
    for param in trainable_table(spec, recipe.method):
        if stages_of(param, recipe.plan, spec) == tuple(range(stages.size)):
            whole = state.engine.store.read("weight", parameters[param.name])
            alike &= len(stages.gather(whole[None], 0).unique(dim=0)) == 1
    return alike


def probe(file: Path) -> dict[str, Any]:
    recipe = load_recipe(file)
    cluster.start(recipe)
    state = step.init_state(resolve(recipe))
    batch = open_dataset(resolve(recipe), "train").batch(0, recipe.batch.global_examples)
    frozen = [name for _ in range(2) for name in gradients_of_frozen(state, batch)]
    # Not by the optimizer's list of parameters, which DeepSpeed's stage 3 keeps empty between updates.
    moments = sum(kept["exp_avg"].numel() for kept in state.optimizer.state.values())
    mine = {"frozen": frozen, "moments": moments, "alike": shared_alike(state)}
    every: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    cluster.finish()
    return {key: [each[key] for each in every] for key in mine}


if __name__ == "__main__":
    probe_all(lambda file: probe(Path(file)))
