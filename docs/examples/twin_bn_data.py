"""What both classifiers share: images and classes, starting weights and statistics, settings."""

import numpy as np

CLASSES, CHANNELS, SIZE, EXAMPLES = 4, 8, 8, 16
STEPS, LR, MOMENTUM = 4, 0.05, 0.9
# After the convolution at stride 2: what a statistic of batch normalisation is the mean of.
POSITIONS = EXAMPLES * (SIZE // 2) ** 2


def batch(step: int) -> dict[str, np.ndarray]:
    """Images [examples, channels, height, width], as torch wants them, and classes."""
    draw = np.random.default_rng((9, step))
    images = draw.standard_normal((EXAMPLES, 3, SIZE, SIZE)) + 0.5
    return {"images": images, "classes": draw.integers(0, CLASSES, EXAMPLES)}


def starting_weights() -> dict[str, np.ndarray]:
    """By torch's names and in torch's layout; running statistics belong to them."""
    draw = np.random.default_rng(4)
    return {
        "conv.weight": draw.standard_normal((CHANNELS, 3, 3, 3)) / 27**0.5,
        "bn.weight": np.ones(CHANNELS),
        "bn.bias": np.zeros(CHANNELS),
        "bn.running_mean": np.zeros(CHANNELS),
        "bn.running_var": np.ones(CHANNELS),
        "head.weight": draw.standard_normal((CLASSES, CHANNELS)) / CHANNELS**0.5,
        "head.bias": np.zeros(CLASSES),
    }
