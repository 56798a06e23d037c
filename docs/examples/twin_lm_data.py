"""What both language models share: batches with padding, starting weights, settings."""

import numpy as np

VOCAB, WIDTH, HEADS, LAYERS, TOKENS = 23, 16, 2, 2, 12
STEPS, EXAMPLES, SLICES = 4, 8, 2
LR, WARMUP, CLIP, DECAY = 3e-3, 3, 1.0, 0.1
IGNORED = -100


def rate(count: int) -> float:
    """The learning rate after `count` updates: both optax and torch's schedulers count from 0."""
    return LR * min(1.0, (count + 1) / WARMUP)


def batch(step: int) -> dict[str, np.ndarray]:
    """Token ids [examples, tokens] and the next tokens as labels; lengths vary, and padding is 0, which texts have, too."""
    draw = np.random.default_rng((3, step))
    ids = draw.integers(0, VOCAB, (EXAMPLES, TOKENS + 1))
    padding = np.arange(TOKENS + 1) >= draw.integers(4, TOKENS + 2, (EXAMPLES, 1))
    return {
        "input_ids": np.where(padding, 0, ids)[:, :-1],
        "labels": np.where(padding, IGNORED, ids)[:, 1:],
    }


def starting_weights() -> dict[str, np.ndarray]:
    """By torch's names and in torch's layout [out, in], in the order in which data flows through them."""
    shapes = {"tokens.weight": (VOCAB, WIDTH), "positions.weight": (TOKENS, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"layers.{i}.norm1.weight": (WIDTH,), f"layers.{i}.norm1.bias": (WIDTH,)}
        shapes |= {f"layers.{i}.qkv.weight": (3 * WIDTH, WIDTH), f"layers.{i}.out.weight": (WIDTH, WIDTH)}
        shapes |= {f"layers.{i}.norm2.weight": (WIDTH,), f"layers.{i}.norm2.bias": (WIDTH,)}
        shapes |= {f"layers.{i}.up.weight": (4 * WIDTH, WIDTH), f"layers.{i}.up.bias": (4 * WIDTH,)}
        shapes |= {f"layers.{i}.down.weight": (WIDTH, 4 * WIDTH), f"layers.{i}.down.bias": (WIDTH,)}
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "head.weight": (VOCAB, WIDTH)}
    draw = np.random.default_rng(2)
    noise = {name: draw.standard_normal(shape) * 0.2 for name, shape in shapes.items()}
    return {
        name: array + (1.0 if "norm" in name and "weight" in name else 0.0) for name, array in noise.items()
    }
