"""Norm, clip factor, rate, moments and updates, by regression: what rule each side followed, whatever the recipe says.

An Adam update u of a weight w with moments m, v is -a m / (sqrt(v) + e) - d w, so

    u sqrt(v) = -a m - e u - d w sqrt(v) - f w

is linear in a, e, d: least squares gives each side's rate, epsilon and decay. With epsilon inside the root,
(u + d w)² v = a² m² - e (u + d w)². At step t, a is the rate times sqrt(1 - beta2^t) / (1 - beta1^t).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parity.comparison.adam import CLIP_EPS
from parity.comparison.pair import NAMES, as_float64
from parity.diagnosis.fact import Fact
from parity.diagnosis.facts.factors import factor_of
from parity.diagnosis.view import Array, View

# Numbers of one side that should be equal are, to this; it is far above rounding in fp32 for sums, below any other cause.
SAME = 1e-5
# A rule fits where it leaves less than this share of the update.
FITS = 1e-3
# Parameters of two fits differ where they do by more than this many times what the fits leave.
CLEARLY = 30.0
FINEST = 1e-8
# Another step is looked for up to here.
LATEST = 1000


def norm(view: View) -> Iterator[Fact]:
    """Whether a norm is that of the recorded gradients, of a part of them, or of more."""
    if view.phase != "grad_norm" or view.sides is None:
        return
    for at, name in enumerate(NAMES):
        squares = _squares(view, at)
        stated, whole = float(view.sides[at]), math.sqrt(sum(squares.values()))
        if not whole or math.isclose(stated, whole, rel_tol=SAME):
            continue
        if stated > whole:
            yield Fact("norm-larger", f"{name}'s norm is {stated:.6g}, that of its gradients {whole:.6g}")
        else:
            part = _part(view, squares, stated)
            yield Fact(
                "norm-of-part",
                f"{name}'s norm is {stated:.6g}, {part or f'less than that of its gradients, {whole:.6g}'}",
            )


def _squares(view: View, side: int) -> dict[str, float]:
    arrays = (
        (name, view.pair.read_side(view.step, "gradient", name, side))
        for name in view.pair.names(view.step, "gradient")
    )
    return {name: float(np.sum(as_float64(a) ** 2)) for name, a in arrays if a is not None}


def _part(view: View, squares: dict[str, float], stated: float) -> str | None:
    """A run of layers, with what is before or after them, whose norm it is."""
    groups: list[tuple[str, float]] = []
    for name in view.pair.structure.in_order(squares, backward=False):
        layer = view.layer(name)
        group = f"layer {layer}" if layer is not None else name
        if groups and groups[-1][0] == group:
            groups[-1] = group, groups[-1][1] + squares[name]
        else:
            groups.append((group, squares[name]))
    for start in range(len(groups)):
        for end in range(start + 1, len(groups) + 1):
            if end - start < len(groups) and math.isclose(
                stated, math.sqrt(sum(square for _, square in groups[start:end])), rel_tol=SAME
            ):
                return f"that of {groups[start][0]}" + (
                    f" to {groups[end - 1][0]}" if end - start > 1 else ""
                )
    return None


def clip(view: View) -> Iterator[Fact]:
    """The factor that each side's gradients have in its moments, tensor by tensor."""
    if view.phase not in ("clip", "moment1") or not view.agrees("gradient"):
        return
    beta = next((b for side in (0, 1) if (b := _beta(view, "moment1", side)) is not None), None)
    if beta is None:
        return
    factors = [_taken(view, side, beta) for side in (0, 1)]
    if not all(factors):
        return
    norms = view.pair.scalar(view.step, "grad_norm")
    spread = [np.ptp(list(each.values())) / max(each.values()) for each in factors]
    for at, name in enumerate(NAMES):
        values = np.array(list(factors[at].values()))
        if spread[at] > FITS and spread[1 - at] <= FITS:
            own = np.array(
                [
                    f * math.sqrt(s)
                    for f, s in zip(values, (_squares(view, at)[n] for n in factors[at]), strict=True)
                ]
            )
            clipped = values < 1.0 - FITS
            if clipped.sum() > 1 and np.ptp(own[clipped]) <= FITS * own[clipped].max():
                yield Fact(
                    "own-norms", f"{name} clips each tensor by its own norm, to {own[clipped].mean():.4g}"
                )
            else:
                yield Fact(
                    "factor-by-tensor",
                    f"{name}'s tensors have factors from {values.min():.4g} to {values.max():.4g}",
                )
            return
        other = np.array(list(factors[1 - at].values()))
        if max(spread) <= FITS and abs(values.mean() - 1.0) <= FITS and other.mean() < 1.0 - FITS:
            yield Fact("not-clipped", f"{name}'s factor is 1, {NAMES[1 - at]}'s {other.mean():.4g}")
            return
    ratio = (
        float(view.sides[1] / view.sides[0]) - 1.0 if view.phase == "clip" and view.sides is not None else 0.0
    )
    if ratio and 0.9 <= abs(ratio) * norms[0] / CLIP_EPS <= 1.1:
        yield Fact(
            "factor-of-epsilon", f"the factors differ by {abs(ratio):.3g} of themselves, {CLIP_EPS:g} / norm"
        )


def _beta(view: View, phase: str, side: int) -> float | None:
    """A side's beta, from the largest tensor of the second step; None if no rule of that kind fits."""
    step = view.pair.first_step + 1
    if step not in view.pair.step_numbers:
        return None
    power = 1 if phase == "moment1" else 2
    names = sorted(view.pair.names(step, phase), key=lambda n: -view.pair.starting_size(n))
    for name in names[:3]:
        moment, gradient, before = (
            view.pair.read(at, group, name)[side]
            for at, group in ((step, phase), (step, "gradient"), (step - 1, phase))
        )
        if moment is None or gradient is None or before is None:
            continue
        columns = np.stack([as_float64(before).ravel(), as_float64(gradient).ravel() ** power])
        kept, rest = _fitted(columns, as_float64(moment).ravel())
        if rest <= FITS and 0.0 < kept[0] < 1.0:
            return float(kept[0])
    return None


def _taken(view: View, side: int, beta: float) -> dict[str, float]:
    """The factor of each tensor's gradient in its first moment; tensors of which it is no multiple are left out."""
    taken = {}
    earlier = view.step - 1 if view.step > view.pair.first_step else 0
    for name in view.pair.names(view.step, "moment1"):
        moment, gradient = (view.pair.read(view.step, group, name)[side] for group in ("moment1", "gradient"))
        if moment is None or gradient is None or not gradient.any():
            continue
        before = view.pair.read(earlier, "moment1", name)[side]
        added = as_float64(moment) - beta * (as_float64(before) if before is not None else 0.0)
        (factor,), rest = _fitted(as_float64(gradient).reshape(1, -1), added.ravel())
        if rest <= FITS:
            taken[name] = float(factor) / (1.0 - beta)
    return taken


def _fitted(columns: Array, target: Array) -> tuple[Array, float]:
    """Least squares: a factor for each column, and the residual as a share of the target."""
    scale = np.maximum(np.linalg.norm(columns, axis=1), np.finfo(np.float64).tiny)
    factors = np.linalg.lstsq((columns / scale[:, None]).T, target, rcond=None)[0] / scale
    size = float(np.linalg.norm(target))
    return factors, float(np.linalg.norm(target - factors @ columns)) / size if size else math.inf


def rate(view: View) -> Iterator[Fact]:
    """Whether a rate is the other's of another step, or a multiple at every step."""
    if view.phase != "lr" or view.sides is None:
        return
    rates = {step: view.pair.scalar(step, "lr") for step in view.pair.step_numbers}
    for at, name in enumerate(NAMES):
        for step in sorted(rates, key=lambda s: abs(s - view.step)):
            same = math.isclose(rates[step][1 - at], float(view.sides[at]), rel_tol=1e-12)
            if step != view.step and same and len({r[1 - at] for r in rates.values()}) > 1:
                yield Fact("rate-of-another-step", f"{name} has {NAMES[1 - at]}'s rate of step {step}")
                return
    ratios = [right / left for left, right in rates.values() if left and right]
    if len(ratios) > 1 and np.allclose(ratios, ratios[0], rtol=1e-9):
        yield Fact("rate-factor", f"right's rate is {ratios[0]:.7g} times left's at every step")


def moments(view: View) -> Iterator[Fact]:
    """A factor that all tensors' moments share, and whether the other moment has its reciprocal."""
    if view.phase not in ("moment1", "moment2") or view.sides is None or not view.agrees("gradient"):
        return
    found = factor_of(*view.sides)
    if found is None:
        return
    yield Fact("moment-factor", f"right's {view.phase} is {found[0]:.6g} times left's")
    other = view.both("moment2" if view.phase == "moment1" else "moment1", view.tensor)
    second = factor_of(*other) if other else None
    if second and math.isclose(found[0] * second[0], 1.0, rel_tol=FITS):
        yield Fact("moments-reversed", f"the two moments differ by {found[0]:.4g} and {second[0]:.4g}")


@dataclass(frozen=True)
class Rule:
    """What a side's Adam did: rate times correction, epsilon times correction, decay times rate; `rest` is left over."""

    rate: float
    epsilon: float
    decay: float
    rest: float
    inside: bool = False


def update(view: View) -> Iterator[Fact]:
    """How the rules that the two sides followed differ."""
    weights = view.pair.weights(view.step)
    moments = [view.both(phase, view.tensor) for phase in ("moment1", "moment2")]
    if view.phase != "update" or view.sides is None or view.tensor not in weights or not all(moments):
        return
    rules = []
    for at in (0, 1):
        m, v = (each[at] for each in moments if each)
        rules.append(_rule(view.sides[at], m, v, weights[view.tensor][at]))
    left, right = rules
    if left is None or right is None:
        return
    if left.inside != right.inside:
        yield Fact("epsilon-inside", f"{NAMES[0 if left.inside else 1]}'s epsilon is inside the root")
        return
    clear = max(FINEST, CLEARLY * max(left.rest, right.rest))
    rates = list(_rates(view, left, right, clear))
    yield from rates
    yield from _decays(view, left, right, clear)
    if any(fact.kind in ("no-correction", "count-of-another-step") for fact in rates):
        return  # which the epsilon has, too
    sizes = np.sqrt(np.abs(moments[1][0])) if moments[1] else np.zeros(1)
    smallest = float(np.quantile(sizes[sizes > 0], 0.01)) if sizes.any() else 0.0
    if abs(left.epsilon - right.epsilon) > clear * (smallest + max(left.epsilon, right.epsilon)) + 0.01 * max(
        abs(left.epsilon), abs(right.epsilon)
    ):
        yield Fact(
            "epsilon",
            f"epsilon is {left.epsilon:.3g} in left, {right.epsilon:.3g} in right, times the correction",
        )


def _rule(u: Array, m: Array, v: Array, w: Array) -> Rule | None:
    """The rule that an update followed, None if it is not Adam's."""
    used = v.ravel() > 0
    u, m, root, w = (each.ravel()[used] for each in (u, m, np.sqrt(np.abs(v)), w))
    if u.size < 8 or not u.any():
        return None
    even = 1.0 / (root + np.median(root))  # so that neither large nor small gradients decide alone
    columns = np.stack([-m, -u, -w * root, -w]) * even
    (rate, epsilon, decay, _), rest = _fitted(columns, u * root * even)
    if rest <= FITS**2:
        return Rule(float(rate), float(epsilon), float(decay), rest)
    best = None
    for share in (decay, 0.0):
        moved = u + share * w
        (square, inside), rest2 = _fitted(
            np.stack([m * m, -moved * moved]) * even, moved * moved * root * root * even
        )
        if best is None or rest2 < best.rest:
            best = Rule(math.sqrt(max(float(square), 0.0)), float(inside), float(share), rest2, inside=True)
    if best and best.rest < 0.1 * rest and best.rest <= FITS and best.epsilon > 0:
        return best
    return Rule(float(rate), float(epsilon), float(decay), rest) if rest <= FITS else None


def _rates(view: View, left: Rule, right: Rule, clear: float) -> Iterator[Fact]:
    """A correction that one side leaves out or takes from another step, or another rate."""
    if math.isclose(left.rate, right.rate, rel_tol=clear):
        return
    betas = [
        next((b for s in (0, 1) if (b := _beta(view, p, s)) is not None), None)
        for p in ("moment1", "moment2")
    ]
    stated = view.pair.scalar(view.step, "lr")
    ratio = right.rate / left.rate if left.rate else 0.0
    if betas[0] and view.step == view.pair.first_step:
        # m is (1 - beta) g then, so beta m + (1 - beta) g is (1 + beta) m.
        for at, times in ((1, ratio), (0, 1.0 / ratio if ratio else 0.0)):
            if math.isclose(times, 1.0 + betas[0], rel_tol=FITS):
                yield Fact(
                    "nesterov",
                    f"{NAMES[at]}'s first update is 1 + beta1 = {times:.6g} times the other's: it looks ahead",
                )
                return
    if all(betas) and all(stated):
        corrections = {
            t: math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
            for t in range(1, LATEST)
            if betas[0] and betas[1]
        }
        for at, rule in enumerate((left, right)):
            times, here = rule.rate / stated[at], corrections.get(view.step)
            if here is None or math.isclose(times, here, rel_tol=FITS):
                continue
            if math.isclose(times, 1.0, rel_tol=FITS):
                yield Fact(
                    "no-correction",
                    f"{NAMES[at]}'s update has no bias correction, which is {here:.4g} at step {view.step}",
                )
                return
            another = [t for t, c in corrections.items() if math.isclose(times, c, rel_tol=1e-4)]
            if another:
                yield Fact(
                    "count-of-another-step", f"{NAMES[at]}'s bias correction is that of step {another[0]}"
                )
                return
    yield Fact(
        "rate",
        f"right's rate is {right.rate / left.rate:.9g} times left's in the update; recorded are {stated[0]:.9g} and {stated[1]:.9g}",
    )


def _decays(view: View, left: Rule, right: Rule, clear: float) -> Iterator[Fact]:
    """Another decay, none, or one without the rate."""
    size = max(abs(left.decay), abs(right.decay))
    noise = max(clear * max(left.rate, right.rate), 1e-12)
    if abs(left.decay - right.decay) <= max(noise, clear * size):
        return
    rates = view.pair.scalar(view.step, "lr")
    small, large = sorted((abs(left.decay), abs(right.decay)))
    if small <= max(noise, FITS * large):
        yield Fact(
            "no-decay",
            f"{NAMES[0 if abs(left.decay) < abs(right.decay) else 1]}'s update of {view.tensor} has no decay",
        )
    elif rates[0] and math.isclose(small / large, rates[0], rel_tol=0.01):
        yield Fact(
            "decay-without-rate",
            f"one side's decay is {large:.4g}, which is not multiplied by the rate {rates[0]:.4g}",
        )
    else:
        yield Fact("decay", f"decay times rate is {left.decay:.4g} in left, {right.decay:.4g} in right")


def momentum(view: View) -> Iterator[Fact]:
    """Momentum and Nesterov of a rule with one slot, by how much of gradient, slot and weight is in the update."""
    slots = (
        sorted(s for s in view.pair.names(view.step, "slot") if s.partition("/")[2] == view.tensor)
        if view.step
        else []
    )
    gradient = view.both("gradient", view.tensor)
    if view.phase != "update" or view.sides is None or len(slots) != 1 or gradient is None:
        return
    slot, weight = view.both("slot", slots[0]), view.pair.weights(view.step).get(view.tensor)
    if slot is None or weight is None or slot[0].shape != view.sides[0].shape:
        return
    parts = []
    for at in (0, 1):
        columns = np.stack([a[at].ravel() for a in (gradient, slot, weight)])
        parts.append(_fitted(columns, view.sides[at].ravel()))
    if max(rest for _, rest in parts) > FITS:
        return
    (left, _), (right, _) = parts
    size = max(abs(left[1]), abs(right[1]))
    taken = [abs(each[0]) > 0.01 * size for each in (left, right)]
    if taken[0] != taken[1]:
        yield Fact(
            "nesterov", f"{NAMES[0 if taken[0] else 1]}'s update takes the gradient besides the momentum"
        )
    elif not math.isclose(left[1], right[1], rel_tol=SAME):
        yield Fact(
            "momentum", f"the momentum's part in the update is {left[1]:.6g} in left, {right[1]:.6g} in right"
        )
