"""What both examples share, as two real programs share their data files: batches, starting weights, settings."""

import numpy as np

INPUTS, HIDDEN, OUTPUTS, EXAMPLES = 6, 16, 3, 32
STEPS, LR = 5, 3e-3


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """([examples, inputs], [examples, outputs]) of an update, float64."""
    draw = np.random.default_rng((7, step))
    inputs = draw.standard_normal((EXAMPLES, INPUTS))
    return inputs, np.sin(inputs[:, :OUTPUTS]) + 0.1 * draw.standard_normal((EXAMPLES, OUTPUTS))


def starting_weights() -> dict[str, np.ndarray]:
    """By torch's names, in torch's layout [out, in]."""
    draw = np.random.default_rng(1)
    return {
        "0.weight": draw.standard_normal((HIDDEN, INPUTS)) / INPUTS**0.5,
        "0.bias": np.zeros(HIDDEN),
        "2.weight": draw.standard_normal((OUTPUTS, HIDDEN)) / HIDDEN**0.5,
        "2.bias": np.zeros(OUTPUTS),
    }
