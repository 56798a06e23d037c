"""The arithmetic of an update: the floating-point operations that its model and method ask for, whoever does them.

Multiplications and additions count as one each. For every token, a weight that is a matrix takes 2 per element in the
forward pass and 2 more in the backward pass for the gradient of its input; if it is trained, another 2 for its own: 6, or 4
of a frozen one. For every pair of a query and a key that it may see, a head of attention takes 2 D for the score and 2 D for
the value in the forward pass, and twice that in the backward pass: 12 H D in a layer. Not counted are: recomputation, padding,
pairs that the mask removes, lookups, norms, rotations, activations, the softmax, the loss, the encoder of virtual tokens,
DoRA's norms, and the optimizer. The formula is that of PaLM (arXiv 2204.02311, appendix B), with the mask's true pairs and
with frozen weights.
"""

# D head dim, H query heads, P virtual tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainspec.methods import ENCODER, MethodSpec, leading_positions, position_shift, virtual_tokens
from trainspec.model import ModelSpec
from trainspec.params import Param

FROZEN, TRAINED, PAIR = 4, 6, 12


@dataclass(frozen=True)
class Arithmetic:
    """Operations of an update: `per_token`, and `per_pair` of a query and a key, in all layers together.

    Every token sees `virtual` tokens more, of which `shift` are positions before its own, and of which `leading` are embeddings
    that are computed like tokens, once in a row. `window` is the model's.
    """

    per_token: float
    per_pair: float
    virtual: int = 0
    shift: int = 0
    leading: int = 0
    window: int | None = None

    def operations(self, segments: NDArray[np.int32]) -> float:
        """Those of a batch, by its segments [examples, sequence]: 0 is padding."""
        tokens = np.count_nonzero(segments) + self.leading * len(segments)
        pairs = len(segments) * self._pairs(self.leading, before=0)
        for row in segments:
            lengths = np.bincount(row)[1:]
            pairs += sum(self._pairs(int(n), before=self.virtual) for n in lengths if n)
        return self.per_token * tokens + self.per_pair * pairs

    def _pairs(self, length: int, *, before: int) -> int:
        """How many keys the queries of a segment see, that has `before` virtual tokens before its own."""
        if before and not self.shift:  # virtual tokens without positions are in every window
            return length * before + self._pairs(length, before=0)
        # Query i sees before + i keys, up to a window's number.
        window = before + length if self.window is None else self.window
        growing = min(length, max(0, window - before))
        return growing * before + growing * (growing + 1) // 2 + (length - growing) * window


def arithmetic(
    model: ModelSpec, method: MethodSpec, *, trained: Sequence[Param], frozen: Sequence[Param]
) -> Arithmetic:
    """The operations of a run that trains `trained` and computes with `frozen` as well."""
    has_head = any(p.role == "head" for p in (*trained, *frozen))
    per_token = sum(
        factor * p.size
        for factor, entries in ((TRAINED, trained), (FROZEN, frozen))
        for p in entries
        if _multiplies_tokens(p, has_head=has_head)
    )
    return Arithmetic(
        per_token=float(per_token),
        per_pair=float(PAIR * model.heads * model.head_dim * model.layers),
        virtual=virtual_tokens(method),
        shift=position_shift(method),
        leading=leading_positions(method),
        window=model.window,
    )


def _multiplies_tokens(param: Param, *, has_head: bool) -> bool:
    """Whether every token is multiplied with the weight. Without a head of its own a model's embedding is its head."""
    if len(param.shape) != 2:
        return False
    match param.role:
        case "linear" | "head":
            return True
        case "embedding":
            return not has_head
        case "adapter":
            return not param.module.startswith(ENCODER)
        case "norm":
            return False
