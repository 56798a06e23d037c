"""Layer functions in numpy, for what is computed before and after a run, whatever the backend."""

from __future__ import annotations

import numpy as np

from trainspec.weight import Array


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), in a form that never overflows."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))
