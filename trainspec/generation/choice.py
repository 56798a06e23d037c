"""The choice of the next token from its logits: the same on every backend, whose logits differ by rounding alone.

The settings mean what they mean in transformers and come in its order: repetition penalty, temperature, top-k, top-p,
min-p. What is drawn is a function of the seed, the number of the prompt and the position of the token, by the counter-based
generator of `trainspec.rng`: not of the batch that a prompt is in, and not of the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainspec.errors import UserError
from trainspec.rng import name_key, threefry2x32

_BITS = 53  # of a float64's significand


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 is greedy: the most probable token, of equal ones the first.

    `top_k` keeps so many tokens, `top_p` the fewest whose probabilities add up to it, `min_p` those that have at least that
    share of the largest probability. `repetition_penalty` divides the positive logits of tokens that are there already, and
    multiplies negative ones. Raises UserError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (self.temperature >= 0.0, "0 or more"),
            "top-k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top-p": (self.top_p is None or 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "min-p": (self.min_p is None or 0.0 <= self.min_p <= 1.0, "0 to 1"),
            "repetition-penalty": (self.repetition_penalty > 0.0, "above 0"),
        }
        for name, (is_good, what) in allowed.items():
            if not is_good:
                value = getattr(self, name.replace("-", "_"))
                raise UserError(f"--{name} {value}: give {what}")
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if filters and self.is_greedy:
            name = filters[0].replace("_", "-")
            raise UserError(
                f"--{name}: has no effect at temperature 0, which takes the first; give --temperature 1, say"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0.0


GREEDY = Sampling()


def choose(
    logits_V: NDArray[Any], sampling: Sampling, *, seen: Sequence[int], prompt: int, position: int
) -> int:
    """The id of the next token. `seen` are the ids before it, `position` is its own, counted from 0 in its row."""
    scores_V = penalised(logits_V.astype(np.float64), seen, sampling.repetition_penalty)
    if sampling.is_greedy:
        return int(scores_V.argmax())
    cumulative_V = np.cumsum(probabilities(scores_V, sampling))
    drawn = uniform(sampling.seed, prompt, position) * cumulative_V[-1]
    # The first token whose cumulative probability is above what was drawn: one of probability 0 never is.
    return int(np.searchsorted(cumulative_V, drawn, side="right"))


@dataclass(frozen=True)
class TokenScore:
    """What the logits said of a token: the logarithm of its probability, before any setting of `Sampling`.

    `rival` is the most probable of the other tokens, and `margin` how far its logit is below the token's; negative where it is above.
    """

    log_prob: float
    rival: int
    margin: float


def score(logits_V: NDArray[Any], token: int) -> TokenScore:
    """What the logits say of `token`."""
    scores_V = logits_V.astype(np.float64)
    logarithm, own = log_prob(scores_V, token), float(scores_V[token])
    scores_V[token] = -np.inf
    rival = int(scores_V.argmax())
    return TokenScore(logarithm, rival, own - float(scores_V[rival]))


def log_prob(scores_V: NDArray[np.float64], token: int) -> float:
    """The logarithm of the probability of `token`."""
    largest = scores_V.max()
    return float(scores_V[token] - largest - np.log(np.exp(scores_V - largest).sum()))


def penalised(scores_V: NDArray[np.float64], seen: Sequence[int], penalty: float) -> NDArray[np.float64]:
    """Logits after the repetition penalty. Source: CTRL (arXiv 1909.05858), with the sign as in transformers."""
    if penalty == 1.0 or not len(seen):
        return scores_V
    ids, scores_V = np.unique(np.asarray(seen)), scores_V.copy()
    scores_V[ids] = np.where(scores_V[ids] < 0.0, scores_V[ids] * penalty, scores_V[ids] / penalty)
    return scores_V


def probabilities(scores_V: NDArray[np.float64], sampling: Sampling) -> NDArray[np.float64]:
    """What tokens are drawn with: 0 for those that a filter leaves out. They are summed, not normed, by the caller."""
    scores_V = scores_V / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scores_V):
        least = np.partition(scores_V, -sampling.top_k)[-sampling.top_k]
        scores_V = np.where(scores_V < least, -np.inf, scores_V)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        order_V = np.argsort(scores_V, kind="stable")
        below_V = np.cumsum(softmax(scores_V[order_V])) <= 1.0 - sampling.top_p
        below_V[-1] = False  # the most probable one stays
        scores_V = scores_V.copy()
        scores_V[order_V[below_V]] = -np.inf
    if sampling.min_p is not None:
        shares_V = softmax(scores_V)
        scores_V = np.where(shares_V < sampling.min_p * shares_V.max(), -np.inf, scores_V)
    return softmax(scores_V)


def softmax(scores_V: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of logits."""
    shares_V = np.exp(scores_V - scores_V.max())
    return shares_V / shares_V.sum()


def uniform(seed: int, prompt: int, position: int) -> float:
    """A number in [0, 1) that depends on these three alone."""
    high, low = threefry2x32(
        name_key(seed, "generation", str(prompt)), np.array([position], np.uint32), np.zeros(1, np.uint32)
    )
    return ((int(high[0]) << 32 | int(low[0])) >> (64 - _BITS)) / 2.0**_BITS
