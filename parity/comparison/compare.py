"""Walks two traces in causal order and judges every location. Nothing is skipped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import inf, isfinite
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parity.comparison.adam import MOMENTS, clip_factors
from parity.comparison.pair import Pair, Sides
from parity.comparison.phases import (
    BATCH_TENSORS,
    CLIP,
    INITIAL_GROUPS,
    INITIAL_PHASES,
    PHASES,
    RECORDED_ON_REQUEST,
    RESUME,
    SCALAR_TENSORS,
    STEP_PHASES,
    STOPPED_PHASES,
    TENSOR_PHASES,
    WEIGHT_SHAPED,
    Location,
    Phase,
)
from parity.comparison.recorded import one_sided, recorded
from parity.comparison.restored import restored_pairs, restored_tensors
from parity.comparison.tolerance import DETERMINED, Bounds, CheckedPair, ProofBounds, largest
from parity.comparison.untrained import frozen_on_one_side, untouched
from trainspec.points import TURNED

Array = NDArray[Any]

# Elements of a tensor that are judged at a time.
BLOCK = 2**16
# Phases whose bounds may be as large as what they bound; all after the gradient is computed from judged values.
EXAMINED = ("gradient", "update")


@dataclass(frozen=True)
class Finding:
    """The result at one location.

    `error` and `bound` are those of the worst element, the one that uses most of its bound, as shares of the tensor's
    largest entry; None if the arrays could not be compared, and `reason` says why. `used` is error / bound or, where
    differences are inherited from earlier phases, the used share of the phase's own bound; infinite if undefined.
    `undetermined` of the `elements` have a bound as large as themselves, so the comparison says nothing about them. If
    that is most of them and neither the tensor as a whole nor what it is along itself has a tighter bound, nothing is `proven`. `values` are those of the
    worst element, at `index`; `names` says whose they are.
    """

    location: Location
    error: float | None
    bound: float | None
    used: float
    reason: str | None = None
    undetermined: int = 0
    elements: int = 0
    proven: bool = True
    values: tuple[float, float] | None = None
    index: tuple[int, ...] | None = None
    names: tuple[str, str] = ("left", "right")

    @property
    def holds(self) -> bool:
        """Whether the location is within its bound."""
        return self.used <= 1.0


@dataclass(frozen=True)
class Comparison:
    """Every finding in causal order, over the `steps` updates that both sides made.

    `notes` come from the bounds, and name what the traces do not record.
    """

    steps: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every location is within its bound."""
        return all(finding.holds for finding in self.findings)

    @property
    def examined(self) -> list[Finding]:
        """The gradients and updates that are within their bounds: those may be so wide that they accept another tensor, too."""
        return _examined(self.findings)

    @property
    def unproven(self) -> list[Finding]:
        """Those whose bounds are that wide: their agreement says nothing."""
        return [f for f in self.examined if not f.proven]

    @property
    def first_divergence(self) -> Finding | None:
        """The first finding, in causal order, that exceeds its bound."""
        return next((finding for finding in self.findings if not finding.holds), None)

    @property
    def worst(self) -> dict[str, Finding]:
        """Per phase, the finding that uses most of its bound (the earliest of equals)."""
        by_phase = {
            phase.name: [f for f in self.findings if f.location.phase == phase.name] for phase in PHASES
        }
        return {name: max(findings, key=lambda f: f.used) for name, findings in by_phase.items() if findings}

    def worst_tensors(self, count: int) -> list[Finding]:
        """The `count` findings that use most of their bounds, one per phase and tensor."""
        worst: dict[tuple[str, str], Finding] = {}
        for finding in sorted(self.findings, key=lambda f: -f.used):
            worst.setdefault((finding.location.phase, finding.location.tensor), finding)
        return list(worst.values())[:count]

    @property
    def undetermined(self) -> float:
        """The share of all update elements whose bound is as large as they are."""
        updates = [f for f in self.findings if f.location.phase == "update"]
        elements = sum(f.elements for f in updates)
        return sum(f.undetermined for f in updates) / elements if elements else 0.0


def compare(pair: Pair, bounds: Bounds, *, stopped: Mapping[str, str] | None = None) -> Comparison:
    """Judge every location of both traces; one that only one side has is a failure.

    `stopped` gives the reason why a side stopped its training; it is reported as a failure at the next step.
    """
    findings = [_judge(location, pair, bounds) for location in locations(pair)]
    findings += _unproven(pair, findings, by_their_like=not isinstance(bounds, ProofBounds))
    findings += ending(pair.steps, stopped or {}, first=pair.first_step)
    notes = [*bounds.notes, *pair.structure.notes(pair.names(0, "weight")), *one_sided(pair)]
    if turned := _turned_alike(findings):
        findings = [finding for finding in findings if finding not in turned]
        notes.append(
            f"{turned[0].location} and {len(turned) - 1} more differ, and nothing after them does: queries and keys are turned "
            "by other angles, and attention sees only the difference of two positions"
        )
    return Comparison(pair.common_steps, tuple(findings), tuple(notes))


def _turned_alike(findings: Sequence[Finding]) -> list[Finding]:
    """The failures at rotated queries and keys, if nothing else fails: they are no difference of the runs."""
    failing = [finding for finding in findings if not finding.holds]
    points = {
        f.location.tensor.rpartition(".")[2] for f in failing if f.location.phase in RECORDED_ON_REQUEST
    }
    others = [f for f in failing if f.location.phase not in RECORDED_ON_REQUEST]
    return failing if not others and points <= set(TURNED) else []


def ending(steps: tuple[int, int], stopped: Mapping[str, str], *, first: int = 1) -> Iterator[Finding]:
    """A failure at the first step that a side did not make; nothing if both made all of theirs, `steps` from `first` on."""
    after = min(steps) + first
    if stopped:
        reason = "; ".join(f"{name} stopped: {why}" for name, why in stopped.items())
        yield _failure(Location(after, "update", "every tensor"), reason)
    elif steps[0] != steps[1]:
        yield _failure(
            Location(after, "batch", "every tensor"), f"left made {steps[0]} updates, right {steps[1]}"
        )


def locations(pair: Pair) -> Iterator[Location]:
    """Every location of the two runs in causal order: what they start from, then step by step, phase by phase."""
    for phase in INITIAL_PHASES:
        names = pair.names(0, INITIAL_GROUPS[phase.name])
        for name in pair.structure.in_order(names, backward=False):
            yield Location(0, phase.name, name)
    steps = [(step, STEP_PHASES) for step in pair.step_numbers]
    steps += [(step, STOPPED_PHASES)] if (step := pair.stopped_step) else []
    for step, step_phases in steps:
        for backward, phases in groupby(step_phases, key=lambda phase: phase.backward):
            tensors = [(phase, name) for phase in phases for name in _tensors(pair, step, phase)]
            if backward:  # one pass: a layer's activations, then its weights, then the layer before
                tensors.sort(key=lambda each: pair.structure.key(each[1]), reverse=True)
            for phase, name in tensors:
                yield Location(step, phase.name, name)


def _tensors(pair: Pair, step: int, phase: Phase) -> list[str]:
    """The tensors compared in a phase. A weight that has a gradient, a moment or an update must have all of them."""
    match phase.kind:
        case "resume":
            return restored_tensors(pair, step)
        case "batch":
            return _batch_tensors(pair.names(step, phase.name))
        case "derived":  # fitted to the moments
            return ["clip_factor"] if all(pair.names(step, moment) for moment in MOMENTS) else []
        case "scalar":
            return list(SCALAR_TENSORS[phase.name])
        case "optional":
            left, right = recorded(pair, step, phase.name)
            names = left & right
            return pair.structure.in_order(names, backward=phase.backward)
        case "slot":
            return _slots(pair, step, phase)
        case "untrained":
            return pair.structure.in_order(pair.names(step, phase.name), backward=False)
        case _:
            groups = [*(each.name for each in TENSOR_PHASES), *MOMENTS]
            trained = set().union(*(pair.names(step, group) for group in groups))
            # The first step tells what is trained: a tensor that is later absent from both sides is missing, too.
            first = set().union(*(pair.names(pair.first_step, group) for group in groups))
            names = (trained | first) - untouched(pair, step)
            return pair.structure.in_order(names, backward=phase.backward) or ["every tensor"]


def _slots(pair: Pair, step: int, phase: Phase) -> list[str]:
    """The state that either side has or had at the first step, but for weights that rest; ordered by slot, then by weight."""
    resting = untouched(pair, step)

    def split(name: str) -> tuple[str, str]:
        slot, _, weight = name.partition("/") if phase.name == "slot" else ("", "", name)
        return slot, weight

    first = {name for name in pair.names(pair.first_step, phase.name) if split(name)[1] not in resting}
    names = pair.names(step, phase.name) | first
    return sorted(names, key=lambda name: (split(name)[0], pair.structure.key(split(name)[1])))


def _batch_tensors(names: set[str]) -> list[str]:
    """What either side recorded, a token batch's own arrays first; both must record something."""
    tokens = [name for name in BATCH_TENSORS if name in names or not names]
    return [*tokens, *sorted(names - set(tokens))]


def _sides(location: Location, pair: Pair) -> Sides:
    if location.phase in SCALAR_TENSORS:
        left, right = pair.scalar(location.step, location.tensor)
        return np.asarray(left), np.asarray(right)
    if location.phase == CLIP:
        left, right = clip_factors(pair, location.step)
        return np.asarray(left), np.asarray(right)
    return pair.read(location.step, location.group, location.tensor)


def _judge(location: Location, pair: Pair, bounds: Bounds) -> Finding:
    if location.phase == RESUME.name:
        restored = restored_pairs(location, pair)
        return _failure(location, restored) if isinstance(restored, str) else _worst(location, restored)
    left, right = _sides(location, pair)
    if left is None or right is None:
        missing = "both sides" if left is right else "left" if left is None else "right"
        return _failure(location, f"missing in {missing}")
    if left.shape != right.shape:
        return _failure(location, f"shape {list(left.shape)} in left, {list(right.shape)} in right")
    if location.phase in WEIGHT_SHAPED:
        weight = pair.forms(0, "weight", location.tensor)[0]
        if weight is not None and weight.shape != left.shape:
            return _failure(
                location, f"shape {list(left.shape)}, its starting weight has {list(weight.shape)}"
            )
    if reason := frozen_on_one_side(location, pair) or bounds.incomparable(location, left, right):
        return _failure(location, reason)
    a, b = (side.astype(np.float64, copy=False) for side in (left, right))
    if reason := _not_finite(a, b):
        return _failure(location, reason)
    worst = _worst(location, bounds.checked_pairs(location, a, b))
    if not worst.holds and left.dtype != right.dtype and location.phase in ("initial", "batch"):
        worst = replace(worst, reason=f"{worst.reason}; {left.dtype} in left, {right.dtype} in right")
    return worst


def _not_finite(left: Array, right: Array) -> str | None:
    """Where NaN and infinity are; None if all numbers are finite."""
    broken = {name: ~np.isfinite(side) for name, side in _named(left, right) if not np.isfinite(side).all()}
    if not broken:
        return None
    if len(broken) == 2 and np.array_equal(broken["left"], broken["right"]):
        return (
            f"not finite in left and right alike: {_entries(broken['left'])}; both sides overflow here, so it is no difference "
            "between them"
        )
    return "not finite in " + ", and in ".join(f"{name}: {_entries(mask)}" for name, mask in broken.items())


def _entries(mask: Array) -> str:
    first = [int(i) for i in np.unravel_index(np.argmax(mask), mask.shape)]
    count = f"{np.count_nonzero(mask)} of {mask.size} {'entry' if mask.size == 1 else 'entries'}"
    return f"{count}, first at {first}" if mask.ndim else count


def _worst(location: Location, checked_pairs: Iterable[CheckedPair]) -> Finding:
    """The finding of the pair that uses most of its bound, with the undetermined elements of all."""
    measured = [(_measure(location, checked), checked.way) for checked in checked_pairs]
    by_way: dict[str, list[Finding]] = {}
    for finding, way in measured:
        by_way.setdefault(way, []).append(finding)
    findings, elementwise = [f for f, _ in measured], by_way.get(CheckedPair.way, [])
    # A failing element tells more than the tensor as a whole: which one, and by how much.
    failing = [f for f in elementwise if not f.holds]
    worst = max(failing or findings, key=lambda finding: finding.used)
    count = max(elementwise, key=lambda f: f.undetermined, default=worst)
    proven = any(all(f.proven for f in each) for each in by_way.values())
    return replace(worst, undetermined=count.undetermined, elements=count.elements, proven=proven)


def _measure(location: Location, checked: CheckedPair) -> Finding:
    """The element that uses most of its bound, and the number of undetermined elements."""
    if checked.norm is not None:
        return _as_a_whole(location, checked, checked.norm)
    left, right, allowed = checked.first, checked.second, checked.bound
    if not left.size:
        return Finding(location, 0.0, 0.0, 0.0)
    for name, array in (
        *zip(checked.names, (left, right), strict=True),
        ("the bound", allowed.own),
        ("the bound", allowed.inherited),
    ):
        if not np.isfinite(array).all():
            return _failure(location, f"nothing is proven: {name} is not finite")
    worst, differing, elements, beyond, noisy = _Element(-inf), 0, 0, 0, 0
    for start, block in _blocks(checked):
        one, other, own, inherited, noise = block
        error, size = np.abs(one - other), np.maximum(np.abs(one), np.abs(other))
        bound = own + inherited
        # Where no difference is allowed, any difference uses infinitely much of the bound and equality uses nothing.
        added = np.maximum(error - inherited, 0.0)
        used = np.divide(added, own, out=np.where(added > 0, inf, 0.0), where=own > 0)
        at = int(np.argmax(used))
        if used[at] > worst.used:
            worst = _Element(float(used[at]), float(error[at]), float(bound[at]), start + at)
        differing += int(np.count_nonzero(error))
        elements += int(np.count_nonzero(size))
        beyond += int(np.count_nonzero((bound >= size) & (size > 0)))
        noisy += int(np.count_nonzero(noise & (size > 0)))
    index, scale = tuple(int(i) for i in np.unravel_index(worst.at, left.shape)), largest(left, right) or 1.0
    return Finding(
        location,
        error=worst.error / scale,
        bound=float(f"{worst.bound / scale:.9g}"),
        used=worst.used,
        reason=f"{differing} of {left.size} entries differ" if worst.used == inf else None,
        undetermined=beyond if checked.undetermined is None else noisy,
        elements=elements,
        proven=beyond <= DETERMINED * elements,
        values=(float(left[index]), float(right[index])),
        index=index,
        names=checked.names,
    )


class _Element(NamedTuple):
    """An element: the share of its bound that it uses, its error and bound, and where it is in the flattened tensor."""

    used: float
    error: float = 0.0
    bound: float = 0.0
    at: int = 0


def _blocks(checked: CheckedPair) -> Iterator[tuple[int, list[Array]]]:
    """Two flattened arrays, their bound and the mask of noise, block by block: an intermediate array is never a whole one."""
    shape, noise = checked.first.shape, checked.undetermined
    everywhere = (
        checked.first,
        checked.second,
        checked.bound.own,
        checked.bound.inherited,
        noise if noise is not None else False,
    )
    flat = [
        np.broadcast_to(array, shape).reshape(-1)
        if np.size(array) > 1
        else np.broadcast_to(np.reshape(array, ()), checked.first.size)
        for array in everywhere
    ]
    for start in range(0, checked.first.size, BLOCK):
        yield start, [array[start : start + BLOCK] for array in flat]


def _as_a_whole(location: Location, checked: CheckedPair, norm: float) -> Finding:
    """The distance of a tensor as a whole; it does not tell which element is off."""
    distance, own, inherited = (float(x) for x in (checked.first, checked.bound.own, checked.bound.inherited))
    for name, number in ((" and ".join(checked.names), distance), ("the bound", own + inherited)):
        if not isfinite(number):
            return _failure(location, f"nothing is proven: {name} is not finite")
    added, scale = max(distance - inherited, 0.0), norm or 1.0
    used = added / own if own > 0 else inf if added > 0 else 0.0
    error, bound = distance / scale, float(f"{(own + inherited) / scale:.9g}")
    over = f"the tensor {checked.way} is off by {error:.2e} of its norm, over the bound {bound:.2e}"
    return Finding(
        location,
        error=error,
        bound=bound,
        used=used,
        reason=over if used > 1 else None,
        proven=own + inherited <= DETERMINED * norm,
    )


def _examined(findings: Sequence[Finding]) -> list[Finding]:
    return [f for f in findings if f.location.phase in EXAMINED and f.holds]


def _unproven(pair: Pair, findings: list[Finding], *, by_their_like: bool) -> Iterator[Finding]:
    """Two kinds of agreement that prove nothing: no update was made, or the bound would accept a different tensor.

    In a precision that hides some tensors (`by_their_like`) one that is not proven is no failure where one of its like is: the
    same weight of another layer, or its own at another step, computed by the same code; but not one before a resume by one after
    it. Where none is, nothing is proven of that code.
    """
    moving = [step for step in pair.step_numbers if max(pair.scalar(step, "lr")) > 0]
    updates = [f for f in findings if f.location.phase == "update"]
    location = Location(moving[0] if moving else pair.first_step, "update", "every tensor")
    if moving and all(f.error == 0 and not f.elements for f in updates):
        yield _failure(location, "nothing was trained: every update is zero on both sides")

    resumed = {f.location.step for f in findings if f.location.phase == RESUME.name}

    def code(finding: Finding) -> tuple[str, str, int]:
        at = finding.location
        return at.phase, pair.structure.in_any_layer(at.tensor), sum(at.step >= each for each in resumed)

    examined = _examined(findings)
    proven = {code(f) for f in examined if by_their_like and f.proven and f.elements}
    for finding in examined:
        if not finding.proven and code(finding) not in proven:
            share = finding.undetermined / finding.elements
            yield _failure(
                finding.location,
                f"nothing is proven: {share:.0%} of the elements are within the reach of rounding"
                + (", and in no layer or step fewer than half" if by_their_like else ""),
            )


def _named(left: Array, right: Array) -> tuple[tuple[str, Array], tuple[str, Array]]:
    return ("left", left), ("right", right)


def _failure(location: Location, reason: str) -> Finding:
    return Finding(location, None, None, inf, reason)
