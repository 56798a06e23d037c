"""What kind of cause a first divergence looks like, in one line if the pattern is known.

A reading is a hint for the user, drawn from the two tensors at the first divergence and from the other locations that
differ. The verdict does not depend on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.comparison.compare import Comparison, Finding
from parity.comparison.pair import Pair
from parity.comparison.phases import PHASES, RESUME, SCALAR_TENSORS
from trainspec.data import IGNORED
from trainspec.trace import Trace

Array = NDArray[Any]
UNKNOWN = "no known pattern"
# A factor explains a difference if the residual is below this share of it.
MAX_RESIDUAL = 0.02
# Two ratios are called equal if they agree to this.
SAME_RATIO = 1e-4
MOST_NAMES = 3
# An error is said to grow with the position from this rank correlation on.
GROWS = 0.6
TOKEN_WISE = ("activation", "activation_gradient")
NOT_DECAYED = re.compile(r"norm|\.bias$|\.bias_[ih]h_")
DIGITS = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Evidence:
    """The first divergence and what a rule may examine. `left` and `right` are float64 and of equal shape.

    `failing` and `judged` are the findings of its step and phase, `counts` what recipe and batch count, by name.
    """

    first: Finding
    failing: tuple[Finding, ...]
    judged: tuple[Finding, ...]
    left: Array
    right: Array
    segments: Array | None
    counts: Mapping[str, float]
    pair: Pair

    @property
    def allowed(self) -> float:
        """The absolute bound at the worst element."""
        scale = max(np.abs(self.left).max(initial=0.0), np.abs(self.right).max(initial=0.0))
        return (self.first.bound or 0.0) * float(scale)


def read(
    comparison: Comparison, traces: tuple[Trace, Trace] | None, *, counts: Mapping[str, float] | None = None
) -> str | None:
    """The reading of a failed comparison; None if it holds, or if there are no arrays to examine.

    `counts` are what the recipe counts (accumulation, rank, ...), by name: a constant factor may be one of them.
    """
    first = comparison.first_divergence
    if first is None or traces is None or first.error is None:
        return None
    pair, location = Pair(*traces), first.location
    if location.phase == RESUME.name:
        return "it resumed from another state than it had when it stopped: the checkpoint, or what writes or reads it"
    arrays = _arrays(first, pair)
    if arrays is None:
        return None
    same = [
        f
        for f in comparison.findings
        if (f.location.step, f.location.phase) == (location.step, location.phase)
    ]
    segments = pair.read(max(location.step, pair.first_step), "batch", "segments")[0]
    evidence = Evidence(
        first, tuple(f for f in same if not f.holds), tuple(same), *arrays, segments,
        dict(counts or {}) | _counts(pair, max(location.step, pair.first_step)), pair,
    )  # fmt: skip
    return next((line for rule in RULES if (line := rule(evidence))), UNKNOWN)


def _arrays(first: Finding, pair: Pair) -> tuple[Array, Array] | None:
    location = first.location
    if location.phase in SCALAR_TENSORS or first.index == ():
        left, right = (
            pair.scalar(location.step, location.tensor)
            if location.phase in SCALAR_TENSORS
            else first.values or (0, 0)
        )
        return np.asarray(left, np.float64), np.asarray(right, np.float64)
    sides = pair.read(location.step, location.group, location.tensor)
    if sides[0] is None or sides[1] is None or sides[0].shape != sides[1].shape:
        return None
    return sides[0].astype(np.float64), sides[1].astype(np.float64)


def _counts(pair: Pair, step: int) -> dict[str, float]:
    """What can be counted in the batch. A loss or gradient divided by the wrong count is off by a ratio of two."""
    labels, segments = (pair.read(step, "batch", name)[0] for name in ("labels", "segments"))
    if labels is None or segments is None or labels.ndim != 2:
        return {}
    return {
        "target tokens": float((labels != IGNORED).sum()),
        "tokens that are not padding": float((segments != 0).sum()),
        "positions": float(labels.size),
        "examples": float(labels.shape[0]),
        "sequence tokens": float(labels.shape[1]),
    }


def data_order(evidence: Evidence) -> str | None:
    """The same examples in another order or step."""
    if evidence.first.location.phase != "batch" or evidence.left.ndim != 2:
        return None
    left, right = (side[np.lexsort(side.T)] for side in (evidence.left, evidence.right))
    if np.array_equal(left, right):
        return "the same examples in another order: the order of the data"
    for other in (evidence.first.location.step - 1, evidence.first.location.step + 1):
        if other in evidence.pair.step_numbers and np.array_equal(_batch_of(evidence, other), evidence.right):
            return f"right has the examples of left's step {other}: the position in the data"
    names = {finding.location.tensor for finding in evidence.failing}
    if names == {"positions"}:
        return "only the positions differ: restarted documents or padding"
    if names == {"labels"}:
        return "only the labels differ: a shift, or which tokens count"
    return None


def _batch_of(evidence: Evidence, step: int) -> Array:
    array = evidence.pair.read(step, "batch", evidence.first.location.tensor)[0]
    return np.zeros(0) if array is None else array


def transposed(evidence: Evidence) -> str | None:
    """A transposed square matrix."""
    if evidence.left.ndim == 2 and evidence.left.shape == evidence.left.T.shape:
        apart = np.abs(evidence.left.T - evidence.right).max(initial=0.0)
        if apart <= 1e-6 * np.abs(evidence.left).max(initial=0.0):
            return "one is the other's transpose: the layout of a weight"
    return None


def schedule(evidence: Evidence) -> str | None:
    """The learning rate of another step."""
    location = evidence.first.location
    if location.phase != "lr":
        return None
    for other in (location.step - 1, location.step + 1):
        rates = evidence.pair.scalar(other, "lr") if other in evidence.pair.step_numbers else None
        if rates and math.isclose(rates[0], float(evidence.right), rel_tol=1e-12):
            return f"right has left's learning rate of step {other}: the schedule is off by one"
    return "the learning rate: peak, warm-up or schedule"


def clipped(evidence: Evidence) -> str | None:
    """The clip factor itself differs."""
    return (
        "the gradient's factor before the moments: the clip"
        if evidence.first.location.phase == "clip"
        else None
    )


def not_updated(evidence: Evidence) -> str | None:
    """One side's update is zero."""
    if evidence.first.location.phase == "update":
        for name, side in (("left", evidence.left), ("right", evidence.right)):
            if not side.any():
                return f"{name} made no update of this tensor: skipped or frozen"
    return None


def decay_mask(evidence: Evidence) -> str | None:
    """Only the updates of norms and biases differ, or all others."""
    if evidence.first.location.phase != "update":
        return None
    names, judged = (
        {f.location.tensor for f in findings} for findings in (evidence.failing, evidence.judged)
    )
    quiet = {name for name in judged if NOT_DECAYED.search(name)}
    if names and names <= quiet < judged:
        return "only norms and biases: which weights decay"
    if names and names == judged - quiet and quiet:
        return "every weight but norms and biases: the decay"
    return None


def constant_factor(evidence: Evidence) -> str | None:
    """One tensor is a multiple of the other."""
    top, bottom = float(np.sum(evidence.left * evidence.right)), float(np.sum(evidence.left**2))
    if not bottom or not top or evidence.first.location.phase in ("batch", "tokens"):
        return None
    factor = top / bottom
    apart = float(np.sqrt(np.sum((evidence.right - evidence.left) ** 2)))
    residual = float(np.sqrt(np.sum((evidence.right - factor * evidence.left) ** 2)))
    if not apart or residual > MAX_RESIDUAL * apart:
        return None
    name = _known_ratio(factor, evidence.counts)
    if name is None and evidence.left.size < 3:
        return None  # any two numbers have a ratio
    return f"right is {factor:.6g} times left: a normalisation or a scale" + (f" ({name})" if name else "")


def _known_ratio(factor: float, counts: Mapping[str, float]) -> str | None:
    """Every count or ratio of counts that equals the factor; there may be several."""
    names = [
        name
        for name, value in _ratios(counts)
        if abs(value - 1.0) > SAME_RATIO and math.isclose(factor, value, rel_tol=SAME_RATIO)
    ]
    return " or ".join(names[:MOST_NAMES]) or None


def _ratios(counts: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    for name, count in counts.items():
        if count > 0:
            yield name, count
            yield f"1 / {name}", 1.0 / count
    for one, a in counts.items():
        for other, b in counts.items():
            if one != other and b > 0:
                yield f"{one} / {other}", a / b


def masked(evidence: Evidence) -> str | None:
    """Only virtual tokens differ, or only padding, or only what follows a document's boundary."""
    wrong = _wrong_positions(evidence)
    if wrong is None or evidence.segments is None or not wrong.any() or wrong.all():
        return None
    in_front, wrong = np.split(wrong, [wrong.shape[1] - evidence.segments.shape[1]], axis=1)
    if not wrong.any():
        return "only on virtual tokens, in front of the embedded ones: the prompt or its encoder"
    if in_front.any():
        return None
    padding = evidence.segments == 0
    if padding.any() and not (wrong & ~padding).any():
        return "only on padded positions: the padding mask"
    padded = padding.any(axis=1)
    if padded.any() and not padded.all() and not wrong[~padded].any():
        return "only in examples that have padding: the padding mask, or positions after it"
    later = evidence.segments > 1
    if later.any() and not (wrong & ~later & ~padding).any():
        return "only after a document's boundary in a packed example: the block mask or restarted positions"
    return None


def grows(evidence: Evidence) -> str | None:
    """The error grows with the position in the document."""
    if _wrong_positions(evidence) is None:
        return None
    positions = evidence.pair.read(evidence.first.location.step, "batch", "positions")[0]
    if positions is None or evidence.segments is None or positions.shape != evidence.segments.shape:
        return None
    error = _by_position(evidence)[:, -positions.shape[1] :]  # of the tokens of the batch
    real = evidence.segments > 0
    at = np.unique(positions[real])
    means = np.array([error[real & (positions == each)].mean() for each in at])
    if len(at) < 8 or means[0] > means.max() / 4 or _rank_correlation(means) < GROWS:
        return None
    return "grows with the position: rotary embedding, its frequencies or its positions"


def _by_position(evidence: Evidence) -> Array:
    """[examples, positions]: the largest difference at each position."""
    error = np.abs(evidence.left - evidence.right)
    return error.reshape(*error.shape[:2], -1).max(axis=-1)


def _wrong_positions(evidence: Evidence) -> Array | None:
    """[examples, positions]: where the bound is exceeded. The virtual tokens of a prompt come before the real ones."""
    if evidence.first.location.phase not in TOKEN_WISE or evidence.segments is None or evidence.left.ndim < 3:
        return None
    examples, tokens = evidence.segments.shape
    if evidence.left.shape[0] != examples or evidence.left.shape[1] < tokens:
        return None
    return _by_position(evidence) > evidence.allowed


def _rank_correlation(values: Array) -> float:
    """Spearman's correlation of values with their order."""
    ranks = np.argsort(np.argsort(values)).astype(np.float64)
    return float(np.corrcoef(np.arange(len(values)), ranks)[0, 1])


def one_family(evidence: Evidence) -> str | None:
    """Only one kind of tensor differs, in one layer or several."""
    if evidence.first.location.phase == "batch":
        return None
    families = {_family(f.location.tensor) for f in evidence.failing}
    others = {_family(f.location.tensor) for f in evidence.judged} - families
    if len(families) == 1 and len(others) >= 2:
        return f"only {next(iter(families))}: that operation"
    return None


def _family(name: str) -> str:
    return DIGITS.sub(".*.", f".{name}").lstrip(".").removeprefix("base_model.model.")


def after_the_first(evidence: Evidence) -> str | None:
    """The optimizer's tensors agree in step 1 and differ later."""
    location = evidence.first.location
    kind = {phase.name: phase.title for phase in PHASES}.get(location.phase)
    if location.step <= evidence.pair.first_step or location.phase not in ("moment1", "moment2", "update"):
        return None
    if location.phase == "update" and not any(
        any(evidence.pair.scalar(step, "lr")) for step in range(evidence.pair.first_step, location.step)
    ):
        return None  # at a learning rate of 0 no earlier update could have been wrong
    return (
        f"{kind} differ from step {location.step} on, not before: the optimizer's state or its count of steps"
    )


RULES: tuple[Callable[[Evidence], str | None], ...] = (
    data_order,
    schedule,
    clipped,
    not_updated,
    transposed,
    constant_factor,
    decay_mask,
    masked,
    grows,
    after_the_first,
    one_family,
)
