"""What checkpoints of a plan hold, and what is restored from them, in processes of a launcher; see test_torch_shards.py.

CASES is a list of {"recipe", "source", "out", "mistake"}: files, directories, and a name of MISTAKES or none. A case restores
the checkpoint `source`, makes an update, saves under `out`, and makes one more; then it begins again, restores what it has
saved and makes the last one again. The leader writes of each case which arrays differ, what was sent while they were saved,
and how many bytes each process saved and read.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup  # pyright: ignore[reportPrivateImportUsage]

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from torchtrain import cluster, step, weights  # noqa: E402
from torchtrain._deepspeed import import_deepspeed  # noqa: E402
from torchtrain.engines.deepspeed import FlatStore  # noqa: E402
from torchtrain.precision import compute_dtype  # noqa: E402
from torchtrain.weights import to_canonical  # noqa: E402
from trainspec.checkpoints import folders  # noqa: E402
from trainspec.checkpoints.checkpoint import Checkpoint, load  # noqa: E402
from trainspec.checkpoints.portable import PortableFormat  # noqa: E402
from trainspec.checkpoints.store import CheckpointStore, manifest_of  # noqa: E402
from trainspec.data import open_dataset  # noqa: E402
from trainspec.plans.pipeline import stages_of  # noqa: E402
from trainspec.recipe import load_recipe  # noqa: E402
from trainspec.runs.processes import Processes  # noqa: E402
from trainspec.runs.run import Run, resolve  # noqa: E402
from trainspec.weight import Index, Weight  # noqa: E402

Named = dict[str, Mapping[str, Any]]
KINDS = ("weights", "moment1", "moment2")
TEXTS = ("", "short", "ä€𝄞 字" * 50_000)
_SENDING = re.compile(r"(all|reduce|broadcast|gather|scatter|send|recv|barrier|monitored)\w*")


@contextmanager
def sent(calls: list[str]) -> Iterator[None]:
    """Appends to `calls` every use of a process group in the block."""
    with ExitStack() as stack:
        for name in filter(_SENDING.fullmatch, dir(ProcessGroup)):
            method = getattr(ProcessGroup, name)

            def call(*args: Any, method: Any = method, name: str = name, **kwargs: Any) -> Any:
                calls.append(name)
                return method(*args, **kwargs)

            stack.enter_context(patch.object(ProcessGroup, name, call))
        yield


def state_of(state: step.State) -> Named:
    """Whole copies, of the leader only."""
    moment1, moment2 = step.moments_of(state)
    return {"weights": step.weights_of(state), "moment1": moment1, "moment2": moment2}


def saved_in(checkpoint: Checkpoint) -> Named:
    return {kind: getattr(checkpoint, kind) for kind in KINDS}


def counted(checkpoint: Checkpoint, read: Counter[str]) -> Checkpoint:
    """The checkpoint, which counts in `read` the bytes of each kind that are read of it."""

    def counting(kind: str, weight: Weight) -> Weight:
        def reading(index: Index) -> Any:
            array = weight[index]
            read[kind] += array.nbytes
            return array

        return replace(weight, read=reading)

    kinds = {k: {n: counting(k, w) for n, w in getattr(checkpoint, k).items()} for k in KINDS}
    return replace(checkpoint, **kinds)


def computed_with(state: step.State) -> Mapping[str, Any]:
    """The trained weights in the type of the computation, as the next forward pass takes them."""
    recipe, spec = state.run.recipe, state.run.spec

    def read(parameter: nn.Parameter) -> Tensor:
        if not hasattr(parameter, "ds_id"):
            return parameter.float()
        with import_deepspeed().zero.GatheredParameters([parameter]):
            return parameter.detach().clone().float()

    return to_canonical(
        dict(state.model.named_parameters()),
        state.run.trained,
        mesh=state.mesh,
        stage=lambda p: stages_of(p, recipe.plan, spec)[0],
        read=read,
        keep=cluster.is_leader(),
    )


def differing(left: Named, right: Named) -> list[str]:
    """The arrays that are not the same bits; on the leader, which alone has them."""
    if not cluster.is_leader():
        return []
    assert left.keys() == right.keys()
    names = []
    for kind, arrays in left.items():
        assert arrays.keys() == right[kind].keys()
        for name, array in arrays.items():
            mine, theirs = np.asarray(array[...]), np.asarray(right[kind][name][...])
            if mine.dtype != theirs.dtype or mine.tobytes() != theirs.tobytes():
                names.append(f"{kind}/{name}")
    return names


def rounded(weights: Mapping[str, Any], run: Run) -> Mapping[str, Any]:
    dtype = compute_dtype(run.recipe.precision.policy)
    return {name: torch.from_numpy(w[...]).to(dtype).float().numpy() for name, w in weights.items()}


def only_master_weights(self: FlatStore, kind: Any, parameter: nn.Parameter, elements: Any) -> None:
    first, mine = self.own(kind, parameter)
    mine.copy_(elements(first, first + len(mine)))


def after_a_collective(state: step.State, _: Any) -> bool:
    return bool(state.mesh.replicas.sum_(torch.ones(1)).isfinite())


SWAPPED = {"weight": "weights", "moment1": "moment2", "moment2": "moment1"}
MISTAKES: dict[str | None, Callable[[], AbstractContextManager[Any]]] = {
    None: nullcontext,
    "moments swapped": lambda: patch.object(step, "_SAVED", SWAPPED),
    "halves of a matrix not told apart": lambda: patch.object(weights, "PARTS", {}),
    "only master weights restored": lambda: patch.object(FlatStore, "write", only_master_weights),
    "processes wait for each other": lambda: patch.object(step, "_saves", after_a_collective),
}


def exchanged(processes: Processes) -> list[str]:
    """Which texts did not arrive: the same of all, and another of each process in turn."""
    count, wrong = processes.count, []
    for first in range(len(TEXTS)):
        texts = [TEXTS[(first + i) % len(TEXTS)] for i in range(count)]
        for sent_texts in (texts, [TEXTS[first]] * count):
            if processes.exchange(sent_texts[processes.index]) != sent_texts:
                wrong.append(f"{[len(text) for text in sent_texts]}")
    return wrong


def probe(recipe_file: Path, source: Path, out: Path) -> dict[str, Any]:
    recipe = load_recipe(recipe_file)
    run = cluster.start(recipe)
    processes, examples = cluster.processes(), recipe.batch.global_examples
    dataset = open_dataset(resolve(recipe), "train")
    found: dict[str, Any] = {"texts": exchanged(processes)}

    checkpoint, read = load(source, run), Counter[str]()
    state = step.restore(step.init_state(run), counted(checkpoint, read))
    found["restored"] = differing(state_of(state), saved_in(checkpoint))
    found["computed"] = differing(
        {"weights": computed_with(state)}, {"weights": rounded(checkpoint.weights, run)}
    )

    state, _ = step.train_step(state, dataset.batch(state.step, examples), lr=1e-3)
    calls: list[str] = []
    with sent(calls):
        shards = list(step.shards_of(state))
        room = sum(step.copied_bytes(state))
    gathered: list[str] = []
    with sent(gathered):
        whole = state_of(state)
    mine = {
        "bytes": sum(s.array.nbytes for s in shards),
        "room": room,
        "read": read,
        "sent": calls,
        "gathered": gathered,
    }
    said = [json.loads(text) for text in processes.exchange(json.dumps(mine))]
    found |= {key: [each[key] for each in said] for key in mine}
    manifest = manifest_of(recipe, None, {p.name: p.shape for p in run.trained})
    store = CheckpointStore(out, PortableFormat(step, run, processes), manifest, recipe.checkpoint, processes)
    store.save(state)
    # What is saved is a copy: the update does not wait for it.
    state, metrics = step.train_step(state, dataset.batch(state.step, examples), lr=1e-3)
    unbroken = state_of(state), metrics.loss_sum
    store.wait()
    processes.exchange("written")  # by the leader, after the others' files
    cluster.finish()

    run = cluster.start(recipe)
    path = folders.latest(out)
    assert path is not None
    found["saved"] = differing(whole, saved_in(load(path, run)))
    state = step.restore(step.init_state(run), load(path, run))
    found["restored again"] = differing(state_of(state), whole)
    state, metrics = step.train_step(state, dataset.batch(state.step, examples), lr=1e-3)
    found["resumed"] = differing(state_of(state), unbroken[0])
    if metrics.loss_sum != unbroken[1]:
        found["resumed"].append("loss")
    cluster.finish()
    return found


def main() -> None:
    cases, results = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    probed = []
    for case in json.loads(cases.read_text()):
        with MISTAKES[case.get("mistake")]():
            probed.append(probe(Path(case["recipe"]), Path(case["source"]), Path(case["out"])))
    if cluster.is_leader():
        results.write_text(json.dumps(probed))


if __name__ == "__main__":
    main()
