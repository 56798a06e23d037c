"""Two sides' responses to the same prompts, held to the float64 reference token by token.

Where both sides have the same tokens so far, each token's log-probability is held to the reference's:

    fp64        FP64_TOLERANCE of the largest logit, and both sides to each other besides
    fp32, bf16  T(N) · U(ν) · σ, σ the larger of the root mean square movement of the token's own log-probability over the draws of the
                reference and that of all tokens; N is the number of tokens, ν EFFECTIVE_DOF for each draw

Where the tokens part, `choices.reach` says of each side's token whether rounding explains that it was chosen. What comes after
has other tokens before it on each side, and is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import numpy as np

from parity.comparison.choices import FixedMovement, MeasuredMovement, Reach, reach
from parity.comparison.estimated_bounds import EFFECTIVE_DOF, gaussian_max_quantile
from parity.comparison.measured_bounds import rms_lower_factor
from parity.comparison.pair import NAMES
from parity.comparison.rescored import RescoredRow, Row
from parity.comparison.tolerance import FP64_TOLERANCE
from trainspec.generation.choice import Sampling, penalised, score, uniform
from trainspec.generation.generation import Generation
from trainspec.plans.names import Policy

Pair = tuple[Generation, Generation]
# Named in a finding between the two sides themselves.
BOTH = "left and right"


@dataclass(frozen=True)
class Gap:
    """Two log-probabilities of one token: `position` counts the response's tokens from 0, `side` says whose departs."""

    prompt: int
    position: int
    side: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether rounding explains it; not that of a number that is none."""
        return self.error <= self.bound

    @property
    def used(self) -> float:
        """The share of the bound; infinite where that is zero, and for a number that is none."""
        used = self.error / self.bound if self.bound else math.inf if self.error else 0.0
        return math.inf if math.isnan(used) else used


@dataclass(frozen=True)
class NextToken:
    """A side's next token where the sides part; `token` is None where its response has ended. `reach` None: nothing explains it.

    `margin` is how far the token's logit is above that of its closest rival, which is `rival`, as the side itself reported.
    """

    side: str
    token: int | None
    rival: int | None = None
    margin: float | None = None
    reach: Reach | None = None

    @property
    def is_explained(self) -> bool:
        """Whether rounding explains the choice."""
        return self.reach is not None and self.reach.is_explained


@dataclass(frozen=True)
class Parting:
    """Where the tokens of two responses part. `drawn` is the number that both sides drew there, None where nothing is drawn."""

    prompt: int
    position: int
    next_tokens: tuple[NextToken, NextToken]
    drawn: float | None = None

    @property
    def has_ended(self) -> bool:
        """Whether one response has ended, and the other has not."""
        return any(each.token is None for each in self.next_tokens)

    @property
    def is_explained(self) -> bool:
        """Whether rounding explains both choices. It never ends a response: tokens are numbers without rounding."""
        return all(each.is_explained for each in self.next_tokens)

    @property
    def departing(self) -> tuple[str, ...]:
        """The sides whose choice rounding does not explain; both, where one has ended."""
        if self.has_ended:
            return NAMES
        return tuple(each.side for each in self.next_tokens if not each.is_explained)


# What a difference is in: the prompt's tokens, a token's log-probability, the choice of a token, the end of a response, its text.
Kind = Literal["prompt", "score", "choice", "end", "text"]


@dataclass(frozen=True)
class Difference:
    """A difference that rounding does not explain: which prompt (from 0), which token of its response, which sides, and what."""

    prompt: int
    position: int
    sides: tuple[str, ...]
    kind: Kind
    what: str


@dataclass(frozen=True)
class ResponseComparison:
    """Both responses to one prompt: `agreed` tokens at their beginning are the same, of `lengths`."""

    prompt: int
    agreed: int
    lengths: tuple[int, int]
    parting: Parting | None
    gaps: tuple[Gap, ...]
    other: Difference | None = None

    @property
    def first_difference(self) -> Difference | None:
        """The first one that rounding does not explain."""
        return min(self.differences, key=lambda d: d.position, default=None)

    @property
    def differences(self) -> list[Difference]:
        """All that rounding does not explain; of one position what was chosen first."""
        found = []
        if self.parting and not self.parting.is_explained:
            ends = self.parting.has_ended
            kind, what = (
                ("end", "one side's response ends") if ends else ("choice", "another token is chosen")
            )
            found.append(Difference(self.prompt, self.parting.position, self.parting.departing, kind, what))
        for gap in self.gaps:
            if not gap.holds:
                what = f"log-probability off by {gap.error:.2e}, bound {gap.bound:.2e}"
                found.append(Difference(self.prompt, gap.position, _whose(gap), "score", what))
        return [*found, self.other] if self.other else found

    @property
    def left_out(self) -> int:
        """How many tokens are not compared, as they come after a parting."""
        return sum(length - self.agreed for length in self.lengths) if self.parting else 0


@dataclass(frozen=True)
class GenerationComparison:
    """All responses of two sides."""

    responses: tuple[ResponseComparison, ...]

    @property
    def holds(self) -> bool:
        """Whether rounding explains all that differs."""
        return self.first_difference is None

    @property
    def first_difference(self) -> Difference | None:
        """The first one by its position in a response, and then by the prompt."""
        found = [d for response in self.responses if (d := response.first_difference)]
        return min(found, key=lambda d: (d.position, d.prompt), default=None)

    @property
    def departing(self) -> tuple[str, ...]:
        """The sides that differ by more than rounding, in any response."""
        sides = {side for response in self.responses for d in response.differences for side in d.sides}
        return tuple(name for name in NAMES if name in sides)

    @property
    def partings(self) -> list[Parting]:
        """All of them, explained or not."""
        return [response.parting for response in self.responses if response.parting]

    @property
    def worst(self) -> Gap | None:
        """The log-probability that used most of its bound."""
        gaps = [gap for response in self.responses for gap in response.gaps]
        return max(gaps, key=lambda gap: gap.used, default=None)

    @property
    def compared(self) -> int:
        """How many tokens both sides have in common."""
        return sum(response.agreed for response in self.responses)

    @property
    def left_out(self) -> int:
        """How many tokens of both sides come after a parting."""
        return sum(response.left_out for response in self.responses)

    @property
    def first_tokens_agree(self) -> bool:
        """Whether no response differs in its first token, which the pass over the prompt gives: what differs is in decoding."""
        return all(
            response.first_difference is None or response.first_difference.position > 0
            for response in self.responses
        )


def rows_of(pairs: Sequence[Pair]) -> list[Row]:
    """What the reference is asked: of every prompt the tokens that both sides have in common."""
    rows = []
    for left, right in pairs:
        agreed = _agreed(left, right)
        rows.append(
            Row([*left.prompt_ids], [*left.ids[:agreed]], agreed < min(len(left.ids), len(right.ids)))
        )
    return rows


def compare_generations(
    pairs: Sequence[Pair], rescored: Sequence[RescoredRow], *, precision: Policy, sampling: Sampling
) -> GenerationComparison:
    """Compare both sides' responses; `rescored` is what the reference says of `rows_of(pairs)`, `sampling` how tokens were chosen.

    The number of a prompt in `pairs` is the one that its draws depend on.
    """
    bounds = _Bounds.of(precision, rescored)
    responses = [
        _response(number, pair, found, bounds, sampling)
        for number, (pair, found) in enumerate(zip(pairs, rescored, strict=True))
    ]
    return GenerationComparison(tuple(responses))


@dataclass(frozen=True)
class _Bounds:
    """Of log-probabilities: `margin` times σ, which is at least `typical`; in fp64 a share of the largest logit."""

    precision: Policy
    typical: float
    margin: float

    @staticmethod
    def of(precision: Policy, rescored: Sequence[RescoredRow]) -> _Bounds:
        moved = np.concatenate([found.moved for found in rescored])
        draws = max((len(found.drawn) for found in rescored), default=0)
        if precision == "fp64":
            return _Bounds(precision, 0.0, 0.0)
        margin = gaussian_max_quantile(moved.size) * rms_lower_factor(EFFECTIVE_DOF * draws)
        return _Bounds(precision, math.sqrt(float(moved.mean())) if moved.size else 0.0, margin)

    def at(self, moved: float, largest: float) -> float:
        """The bound of one token, from its mean square movement and the largest logit of its position."""
        if self.precision == "fp64":
            return FP64_TOLERANCE * largest
        return self.margin * max(math.sqrt(moved), self.typical)


def _agreed(left: Generation, right: Generation) -> int:
    """How many tokens at the beginning of both are the same."""
    together = zip(left.ids, right.ids, strict=False)
    return sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], together))


def _response(
    number: int, pair: Pair, found: RescoredRow, bounds: _Bounds, sampling: Sampling
) -> ResponseComparison:
    left, right = pair
    agreed, lengths = _agreed(left, right), (len(left.ids), len(right.ids))
    gaps = [gap for at in range(agreed) for gap in _gaps(number, at, pair, found, bounds)]
    parting = None
    if agreed < max(lengths):
        parting = _parting(number, agreed, pair, found, bounds, sampling)
        gaps += _parted_gaps(number, agreed, pair, found, bounds)
    return ResponseComparison(number, agreed, lengths, parting, tuple(gaps), _other(number, pair, parting))


def _gaps(number: int, at: int, pair: Pair, found: RescoredRow, bounds: _Bounds) -> list[Gap]:
    """Those of an agreed token."""
    bound = bounds.at(float(found.moved[at]), float(found.largest[at]))
    said = [_log_prob(side, at) for side in pair]
    gaps = [
        Gap(number, at, name, abs(each - float(found.log_probs[at])), bound)
        for name, each in zip(NAMES, said, strict=True)
    ]
    if bounds.precision == "fp64" and all(gap.holds for gap in gaps):  # else it says which side departs
        gaps.append(Gap(number, at, BOTH, abs(said[0] - said[1]), bound))
    return gaps


def _parted_gaps(number: int, at: int, pair: Pair, found: RescoredRow, bounds: _Bounds) -> list[Gap]:
    """Those of the two tokens at a parting, which have the same tokens before them."""
    gaps = []
    for name, side in zip(NAMES, pair, strict=True):
        if found.logits.size and at < len(side.ids):
            token, largest = side.ids[at], float(np.abs(found.logits).max())
            wanted = score(found.logits, token).log_prob
            moved = [score(each, token).log_prob - wanted for each in found.drawn]
            bound = bounds.at(float(np.mean(np.square(moved))) if moved else 0.0, largest)
            gaps.append(Gap(number, at, name, abs(_log_prob(side, at) - wanted), bound))
    return gaps


def _parting(
    number: int, at: int, pair: Pair, found: RescoredRow, bounds: _Bounds, sampling: Sampling
) -> Parting:
    seen = [*pair[0].prompt_ids, *pair[0].ids[:at]]
    drawn = uniform(sampling.seed, number, len(seen))
    next_tokens = []
    for name, side in zip(NAMES, pair, strict=True):
        if at >= len(side.ids):
            next_tokens.append(NextToken(name, None))
            continue
        token, own, explained = side.ids[at], side.scores[at] if side.scores else None, None
        if found.logits.size:
            scores = penalised(found.logits, seen, sampling.repetition_penalty)
            drawn_scores = [penalised(each, seen, sampling.repetition_penalty) for each in found.drawn]
            is_fixed = bounds.precision == "fp64"
            movement = FixedMovement(scores) if is_fixed else MeasuredMovement(scores, np.array(drawn_scores))
            explained = reach(token, scores, movement, sampling, drawn)
        rival, margin = (own.rival, own.margin) if own else (None, None)
        next_tokens.append(NextToken(name, token, rival, margin, explained))
    return Parting(number, at, (next_tokens[0], next_tokens[1]), None if sampling.is_greedy else drawn)


def _other(number: int, pair: Pair, parting: Parting | None) -> Difference | None:
    """What differs though the tokens do not: the prompt's ids, how the response ended, its text."""
    left, right = pair
    if left.prompt_ids != right.prompt_ids:
        return Difference(number, 0, NAMES, "prompt", "the prompt has other tokens")
    if parting:
        return None
    last = len(left.ids) - 1
    if left.finish != right.finish:
        return Difference(
            number, last, NAMES, "end", f"ends with {left.finish!r} left, {right.finish!r} right"
        )
    if left.text != right.text:
        return Difference(number, last, NAMES, "text", "the same tokens are other text")
    return None


def _log_prob(side: Generation, at: int) -> float:
    return side.scores[at].log_prob if side.scores else math.nan


def _whose(gap: Gap) -> tuple[str, ...]:
    return NAMES if gap.side == BOTH else (gap.side,)
