"""What the two runs are: method, plan, shape of the batch, kind of model."""

from __future__ import annotations

from collections.abc import Iterator

from parity.comparison.phases import RESUME
from parity.diagnosis.fact import Fact
from parity.diagnosis.view import View
from trainspec.methods import ENCODER

# Which kind of fact a method of the header stands for.
METHODS = {
    "lora": "low-rank",
    "dora": "low-rank",
    "adapter": "bottleneck",
    "prompt": "prompt",
    "ptuning": "prompt",
    "prefix": "prefix",
    "full": "full",
}


def settings(view: View) -> Iterator[Fact]:
    """Facts of method and plan, from the headers of the traces and from the names in them."""
    kinds = view.setting("method", "kind")
    for kind in sorted(kinds & set(METHODS)):
        yield Fact(METHODS[kind], f"the method is {kind}")
    if "dora" in kinds:
        yield Fact("dora", "the method is dora")
    weights = view.pair.names(0, "weight")
    if not kinds and any("lora_" in name for name in weights):
        yield Fact("low-rank", "there are low-rank factors")
    if any(ENCODER in name for name in weights):
        yield Fact("encoder", "an encoder makes the virtual tokens")
    if any(rate for rate in view.setting("method", "dropout")):
        yield Fact("dropout", "the method has dropout")
    if view.setting("plan", "remat") - {"none"}:
        yield Fact("remat", "activations are computed again in the backward pass")
    for kind, ways, what in (
        ("tensor-split", view.ways("tensor"), "tensor ranks"),
        ("replicas", view.replicas, "replicas"),
        ("stages", view.ways("pipe"), "pipeline stages"),
    ):
        if ways > 1:
            yield Fact(kind, f"{ways} {what}")
    if view.setting("plan", "shards") - {"nothing"}:
        yield Fact("optimizer-split", "the optimizer's state is split")
    if len(view.slices()) > 1:
        yield Fact("accumulated", f"{len(view.slices())} slices or microbatches")


def model(view: View) -> Iterator[Fact]:
    """Facts of the model, by the roles and the shapes of its weights."""
    shapes = view.pair.starting_shapes()
    roles = {name: view.role(name) for name in shapes}
    norms = {name: shapes[name] for name, role in roles.items() if role == "norm"}
    outside = {shape for name, shape in norms.items() if view.layer(name) is None}
    if outside and any(view.layer(n) is not None and s not in outside for n, s in norms.items()):
        yield Fact("head-norms", "queries and keys are normed")
    if "embedding" in roles.values() and "head" not in roles.values():
        yield Fact("tied", "embedding and head are one weight")
    if any(name.endswith(".bias") and roles[name] == "linear" for name in shapes):
        yield Fact("biased", "linear layers have biases")


def batch(view: View) -> Iterator[Fact]:
    """Padding, packing, and what came before this step."""
    segments = view.batch("segments")
    if segments is not None and (segments == 0).any():
        yield Fact("padded", "some examples are padded")
    if segments is not None and (segments > 1).any():
        yield Fact("packed", "some examples hold several documents")
    if view.step and view.pair.names(view.step, RESUME.name):
        yield Fact("resumed", f"a side resumed just before step {view.step}")
    if view.step > view.pair.first_step:
        yield Fact("later-step", f"steps before {view.step} agree")
