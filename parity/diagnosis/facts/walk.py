"""Where in the walk the first divergence is, what agrees before it, and which tensors of its phase differ."""

from __future__ import annotations

import re
from collections.abc import Iterator

from parity.comparison.phases import WEIGHT_SHAPED
from parity.diagnosis.fact import Fact
from parity.diagnosis.view import TOKEN_WISE, View, operation
from trainspec.methods import ENCODER, PEFT_PREFIX

DIGITS = re.compile(r"\.\d+\.")
LORA_B = ".lora_B."
BIAS = re.compile(r"\.bias$|\.bias_[ih]h_")


def location(view: View) -> Iterator[Fact]:
    """The operation at which it is."""
    if view.phase not in TOKEN_WISE:
        return
    if kind := operation(view.tensor):
        yield Fact(kind, f"first at {view.tensor}")
    parts = [
        f
        for f in view.judged
        if operation(f.location.tensor) == "at-adapter"
        and view.layer(f.location.tensor) == view.layer(view.tensor)
    ]
    before = parts and view.judged.index(parts[0]) < view.judged.index(view.first)
    if before and kind not in ("at-adapter", "at-norm"):
        yield Fact("adapter-agrees", "what the adapter adds in this layer before that agrees")
    if view.layer(view.tensor) == 0:
        yield Fact("first-layer", "in the first layer")


def recovery(view: View) -> Iterator[Fact]:
    """Whether the error of a gradient is gone further back in the walk, as where shares are summed later than they should be."""
    if view.phase != "activation_gradient" or view.first not in view.judged:
        return
    later = view.judged[view.judged.index(view.first) + 1 :]
    if later and later[0].holds and sum(f.holds for f in later) > len(later) / 2:
        yield Fact(
            "agrees-further-back", f"the gradient of {later[0].location.tensor}, which comes of it, agrees"
        )


def agreement(view: View) -> Iterator[Fact]:
    """What agrees at its step although something else does not."""
    for kind, phase, words in (
        ("batch-agrees", "batch", "the batch agrees"),
        ("activation-gradients-agree", "activation_gradient", "the gradients of all activations agree"),
        ("gradients-agree", "gradient", "all gradients agree"),
        ("norm-agrees", "grad_norm", "the gradient norm agrees"),
    ):
        if view.phase != phase and view.agrees(phase):
            yield Fact(kind, words)
    if view.agrees("activation", "logits"):
        yield Fact("logits-agree", "the logits agree")
    if view.phase in ("activation_gradient", "gradient") and view.agrees("loss"):
        has_points = any(f.location.phase == "activation" for f in view.comparison.findings)
        if not has_points or view.agrees("activation"):
            yield Fact("forward-agrees", "the forward pass agrees, loss included")
            weights = view.pair.weights(view.step)
            if any(weights[name][0].any() for name in weights if LORA_B in name):
                yield Fact("agrees-with-adapter", "it does so with an adapter whose B is not zero")
    if view.phase == "update" and view.agrees("moment1") and view.agrees("moment2"):
        yield Fact("moments-agree", "both moments agree")


def tensors(view: View) -> Iterator[Fact]:
    """Which tensors of its phase differ, by their roles and families."""
    if view.phase not in (*WEIGHT_SHAPED, "initial", "resume", "slot"):
        return
    failing = [f.location.tensor for f in view.failing]
    others = {f.location.tensor for f in view.judged} - set(failing)
    shown = ", ".join(failing[:2]) + (", ..." if len(failing) > 2 else "")
    if len(failing) == 1 and others:
        yield Fact("one-tensor", f"only {failing[0]} differs, {len(others)} agree")
    if not others and len(failing) > 1:
        yield Fact("every-tensor", f"all {len(failing)} tensors differ")
    families = {family(name) for name in failing}
    if len(families) == 1 and len({family(name) for name in others} - families) >= 2:
        yield Fact("one-family", f"only {next(iter(families))} differs")
    for kind, mine, words in (
        ("only-norms-and-biases", _is_quiet, "norms and biases"),
        ("only-decaying", lambda v, name: not _is_quiet(v, name), "weights that decay"),
        ("only-whole-on-ranks", _is_whole, "norms and adapters"),
        ("only-adapter", lambda v, name: v.role(name) == "adapter", "an adapter's weights"),
        ("only-embedding", lambda v, name: v.role(name) == "embedding", "the embedding"),
        ("only-encoder", lambda v, name: ENCODER in name, "the encoder of virtual tokens"),
    ):
        is_told_apart = any(not mine(view, name) for name in others) or kind in (
            "only-adapter",
            "only-encoder",
        )
        is_all_of_them = kind != "only-decaying" or not any(mine(view, name) for name in others)
        if all(mine(view, name) for name in failing) and is_told_apart and is_all_of_them:
            yield Fact(kind, f"only {words}: {shown}")


def changes(view: View) -> Iterator[Fact]:
    """A weight that one side leaves alone: at this phase, or seen in a later one of the step."""
    for finding in view.comparison.findings:
        where = finding.location
        if finding.holds or where.phase != "change" or where.step != view.step:
            continue
        moved = [
            side is not None and bool(side.any())
            for side in view.pair.read(where.step, "change", where.tensor)
        ]
        if moved[0] != moved[1]:
            yield Fact("frozen-changes", f"{where.tensor} changes in {'left' if moved[0] else 'right'} only")
            return


def family(name: str) -> str:
    """A name with its layer left out."""
    return DIGITS.sub(".*.", f".{name}").lstrip(".").removeprefix(PEFT_PREFIX)


def _is_quiet(view: View, name: str) -> bool:
    return view.role(name) == "norm" or BIAS.search(name) is not None


def _is_whole(view: View, name: str) -> bool:
    return view.role(name) in ("norm", "adapter")
