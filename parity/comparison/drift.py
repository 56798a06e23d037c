"""How far the two sides' weights have drifted apart, and what that alone does to a gradient.

The growth model: a module whose effective weight differs between the sides by a share d (Frobenius norms) changes
what passes through it by that share, once forward and once backward, and nothing amplifies the change on its way. So a
gradient's relative change is at most 2 · sum of d over all modules. A bias is measured against its weight (after a
norm the input has unit size, so |bias| compares with |weight|). A pair of matrices whose product is added to something
else is measured against that: LoRA's against the matrix, a bottleneck adapter's against the identity, with norm sqrt(E).
The adapter's biases are measured against the projection before it or, if the traces do not tell which that is, its own
matrices. The gradient of one of a pair is proportional to the other, whose own relative distance is added.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity.comparison.pair import Pair
from trainspec.methods import ENCODER, PEFT_PREFIX, Method

Array = NDArray[Any]
Weights = Mapping[str, tuple[Array, Array]]
# Name suffixes of the two halves of a pair.
INNER, OUTER = (".lora_A.weight", "_adapter.down.weight"), (".lora_B.weight", "_adapter.up.weight")
_ADAPTER = re.compile(r"(attention_adapter|mlp_adapter)\.(down|up)$")


def lora_scale(method: Method) -> float:
    """What a low-rank product is multiplied by; 1 if the method has none."""
    return method.low_rank_scale


def network_drift(pair: Pair, step: int, *, lora_scale: float) -> float:
    """2 · sum over modules of the relative distance of their effective weights before update `step`."""
    weights = pair.weights(step)
    distance: dict[str, float] = defaultdict(float)
    for name, (left, right) in weights.items():
        size = _reference_size(pair, name, weights)
        apart = _norm(left - right)
        if (partner := _partner(name)) != name:
            apart *= _norm(weights[partner][0]) if partner in weights else 0.0
            apart *= lora_scale if name.endswith((INNER[0], OUTER[0])) else 1.0
        distance[_module(name)] += apart / size if size else 0.0
    return 2.0 * sum(distance.values())


def partner_drift(pair: Pair, step: int, name: str) -> float:
    """The relative distance of a weight's other half; 0 for a weight that is not one of a pair."""
    if _partner(name) == name or _partner(name) not in pair.weights(step):
        return 0.0
    left, right = pair.weights(step)[_partner(name)]
    size = max(_norm(left), _norm(right))
    return _norm(left - right) / size if size else 0.0


def _module(name: str) -> str:
    for suffix in (INNER[0], OUTER[0]):
        if name.endswith(suffix):
            return name.removeprefix(PEFT_PREFIX).removesuffix(suffix)
    for suffix in (".weight", ".bias"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name.replace(".bias_", ".weight_") if name.startswith(ENCODER) else name  # an LSTM's


def _reference_size(pair: Pair, name: str, weights: Weights) -> float:
    """The norm of what the weight's module is measured against; the starting norm if that is frozen."""
    module = _module(name)
    if adapter := _ADAPTER.search(module):
        if name.endswith(".weight"):
            return math.sqrt(weights[name][0].shape[1 if adapter.group(2) == "down" else 0])
        module = pair.structure.projection_before(name) or module
    for base in (f"{module}.weight", module):
        if base in weights:
            return _norm(weights[base][0])
    return pair.starting_size(f"{module}.weight")


def _partner(name: str) -> str:
    """The other half of a pair (for an inner bias the outer matrix); the name itself if there is none."""
    for inner, outer in zip(INNER, OUTER, strict=True):
        if name.endswith(inner):
            return name.removesuffix(inner) + outer
        if name.endswith(outer):
            return name.removesuffix(outer) + inner
    return name.replace("_adapter.down.bias", "_adapter.up.weight")


def _norm(array: Array) -> float:
    return float(np.sqrt(np.sum(np.square(array))))
