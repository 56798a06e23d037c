"""How far the two sides' weights have come apart, and what that alone does to a gradient.

The growth model: a module whose effective weight differs by a share d between the sides (Frobenius norms) moves
what passes through it by that share, once forward and once backward, and nothing amplifies it on its way. So a
gradient's relative movement is at most 2 · sum of d over all modules. A low-rank pair is measured against the
matrix it is added to; a bias likewise (behind a norm the input has unit size, so |bias| compares with |weight|).
The gradient of A is proportional to B and the reverse: that partner's own relative distance comes on top.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.pair import Pair
from trainspec.methods import PEFT_PREFIX

Array = NDArray[Any]
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


def network_drift(pair: Pair, step: int, *, lora_scale: float) -> float:
    """2 · sum over modules of the relative distance of their effective weights before update `step`."""
    weights = pair.weights(step)
    distance: dict[str, float] = defaultdict(float)
    for name, (left, right) in weights.items():
        module = _module(name)
        size = _base_size(pair, module, weights)
        apart = _norm(left - right)
        if name.endswith((LORA_A, LORA_B)):
            apart *= lora_scale * _norm(weights[_partner(name)][0]) if _partner(name) in weights else 0.0
        distance[module] += apart / size if size else 0.0
    return 2.0 * sum(distance.values())


def partner_drift(pair: Pair, step: int, name: str) -> float:
    """The relative distance of the other half of a low-rank pair; 0 for every other weight."""
    if not name.endswith((LORA_A, LORA_B)) or _partner(name) not in pair.weights(step):
        return 0.0
    left, right = pair.weights(step)[_partner(name)]
    size = max(_norm(left), _norm(right))
    return _norm(left - right) / size if size else 0.0


def _module(name: str) -> str:
    plain = name.removeprefix(PEFT_PREFIX)
    for tail in (LORA_A, LORA_B, ".weight", ".bias"):
        if plain.endswith(tail):
            return plain.removesuffix(tail)
    return plain


def _base_size(pair: Pair, module: str, weights: dict[str, tuple[Array, Array]]) -> float:
    """The norm of the matrix that the module adds to; where it is frozen, as it started."""
    name = f"{module}.weight"
    if name in weights:
        return _norm(weights[name][0])
    return pair.starting_size(name)


def _partner(name: str) -> str:
    return name.replace(LORA_A, LORA_B) if name.endswith(LORA_A) else name.replace(LORA_B, LORA_A)


def _norm(array: Array) -> float:
    return float(np.sqrt(np.sum(np.square(array))))
