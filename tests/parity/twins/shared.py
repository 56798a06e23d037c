"""What both programs share, as two real ones share their data: batches, starting weights, settings.

The model: a convolution at stride 2, batch normalisation, gelu, a mean over positions, a frozen projection, a hidden layer,
layer norm and a head. The loss regresses on targets and on a target network's output; two accumulation slices.
"""

from __future__ import annotations

import numpy as np

STEPS, EXAMPLES, SLICES = 4, 8, 2
PEAK, DECAY, CLIP, TAU, NORM_EPS = 0.02, 0.01, 0.5, 0.05, 1e-5
# Binary fractions, so that float32 computes 1 - beta exactly.
BETAS, EPS = (0.875, 0.96875), 1e-8
OPTIMIZERS = ("sgd", "momentum", "adamw", "adamw_bf16", "lion", "adafactor", "muon")
MUON_BETA, MUON_EPS = 0.875, 1e-8
TRAINED = (
    "conv.weight", "bn.weight", "bn.bias", "hidden.weight", "hidden.bias", "norm.weight", "norm.bias", "head.weight",
    "head.bias",
)  # fmt: skip
SHAPES = {
    "conv.weight": (8, 3, 3, 3),
    "bn.weight": (8,),
    "bn.bias": (8,),
    "bn.running_mean": (8,),
    "bn.running_var": (8,),
    "bn.num_batches_tracked": (),
    "frozen.weight": (8, 8),
    "hidden.weight": (16, 8),
    "hidden.bias": (16,),
    "norm.weight": (16,),
    "norm.bias": (16,),
    "head.weight": (4, 16),
    "head.bias": (4,),
    "target.weight": (4, 16),
}


def rate(step: int, *, offset: int = 0) -> float:
    """A warm-up over three steps, counted from 1."""
    return PEAK * min(1.0, (step + offset) / 3)


def starting_weights(dtype: str) -> dict[str, np.ndarray]:
    """By torch's names, in torch's layout."""
    draw, weights = np.random.default_rng(11), {}
    for name, shape in SHAPES.items():
        if name.endswith("tracked"):
            weights[name] = np.array(0, np.int64)
        elif name.endswith(("running_var", "norm.weight", "bn.weight")):
            weights[name] = np.ones(shape, dtype)
        elif len(shape) == 1:
            weights[name] = (0.1 * draw.standard_normal(shape)).astype(dtype)
        else:
            weights[name] = (draw.standard_normal(shape) / np.prod(shape[1:]) ** 0.5).astype(dtype)
    return weights


def batch(step: int, dtype: str) -> dict[str, np.ndarray]:
    """Images [examples, channels, height, width] and targets of an update."""
    draw = np.random.default_rng((5, step))
    images = draw.standard_normal((EXAMPLES, 3, 8, 8)) + 0.5
    return {"images": images.astype(dtype), "targets": draw.standard_normal((EXAMPLES, 4)).astype(dtype)}
