"""A small training run in numpy that writes a trace, and every mistake that the tests plant in it.

The loss is a quadratic of the weights, f = 3 + sum(c · w + h w²/2) with a new c at every step, so gradients,
their dependence on drifting weights, and the loss all belong together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from trainspec.data import Batch
from trainspec.trace import StepTrace, TraceName, TraceWriter

SHAPES = {
    "model.embed_tokens.weight": (32, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 16),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.down_proj.weight": (8, 16),
    "model.norm.weight": (8,),
    "lm_head.weight": (32, 8),
}
DECAYED = {name for name in SHAPES if "norm" not in name}
# What each is in the model, in the order of the data.
ROLES = ("embedding", "linear", "linear", "linear", "linear", "norm", "head")
LAYERS = (None, 0, 0, 1, 1, None, None)
ORDER = tuple(TraceName(*each) for each in zip(SHAPES, ROLES, LAYERS, strict=True))
Q1 = "model.layers.1.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Sim:
    """One run. The second block of fields are the planted mistakes."""

    steps: int = 3
    dtype: Literal["float64", "float32"] = "float64"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.01
    clip: float = 1.0
    fused: bool = False  # the other order of the same operations

    lr_factor: float = 1.0
    logs_true_lr: bool = True
    eps_inside: bool = False
    coupled_decay: bool = False
    no_decay: bool = False
    frozen: bool = False
    no_bias_correction: bool = False
    loss_factor: float = 1.0
    gradient_factor: tuple[str, float] = ("", 1.0)
    token: bool = False
    label_shift: bool = False
    missing: tuple[int, str] = (0, "")
    not_a_number: str = ""
    noiseless_zero: bool = False  # one gradient that is zero but for the noise
    noise: float = 0.0
    noise_seed: int = 0

    def but(self, **changes) -> Sim:
        return replace(self, **changes)


def _normal(shape, *key: int) -> np.ndarray:
    return np.random.default_rng(key).standard_normal(shape)


def start() -> dict[str, np.ndarray]:
    weights = {name: 0.02 * _normal(shape, 1, i) for i, (name, shape) in enumerate(SHAPES.items())}
    return weights | {"model.norm.weight": np.ones(8)}


def batch(sim: Sim, step: int) -> Batch:
    ids = np.random.default_rng((2, step)).integers(0, 32, (4, 16)).astype(np.int32)
    labels = ids.copy()
    labels[:, 0] = -100
    if sim.token:
        ids[2, 5] = (ids[2, 5] + 1) % 32
    if sim.label_shift:
        labels = np.roll(labels, -1, axis=1)
    positions = np.tile(np.arange(16, dtype=np.int32), (4, 1))
    return Batch(ids, labels, positions, np.ones_like(ids), np.arange(4, dtype=np.int32))


def loss_and_gradients(sim: Sim, weights, step: int):
    loss, gradients = 3.0, {}
    for i, (name, w) in enumerate(weights.items()):
        c, h = 0.05 * _normal(w.shape, 3, i, step).astype(w.dtype), np.full(w.shape, 0.5, w.dtype)
        if sim.noiseless_zero and name == Q1:
            c[0, 0] = h[0, 0] = 0
        loss += float(np.sum(c * w + h * w * w / 2))
        gradient = c + h * w
        factor = sim.gradient_factor[1] if name == sim.gradient_factor[0] else 1.0
        wobble = sim.noise * np.abs(gradient).max() * _normal(w.shape, 4, i, step, sim.noise_seed)
        gradients[name] = (gradient * w.dtype.type(factor) + wobble).astype(w.dtype)
    return loss * sim.loss_factor, gradients


def adamw(sim: Sim, w, g, m, v, step: int, lr: float, decayed: bool):
    """One update of one tensor in its own type; returns (weight, moment1, moment2)."""
    one = w.dtype.type
    (b1, b2), decay = sim.betas, sim.decay if decayed and not sim.no_decay else 0.0
    if sim.coupled_decay:
        g, decay = g + one(decay) * w, 0.0
    if sim.fused:
        m, v = m + (g - m) * one(1 - b1), v * one(b2) + g * (g * one(1 - b2))
    else:
        m, v = one(b1) * m + one(1 - b1) * g, one(b2) * v + one(1 - b2) * g * g
    c1, c2 = (1.0, 1.0) if sim.no_bias_correction else (1 - b1**step, 1 - b2**step)
    if sim.eps_inside:
        denominator = np.sqrt(v / one(c2) + one(sim.eps))
    elif sim.fused:
        denominator = np.sqrt(v) / one(np.sqrt(c2)) + one(sim.eps)
    else:
        denominator = np.sqrt(v / one(c2)) + one(sim.eps)
    if sim.fused:
        return w * one(1 - lr * decay) - one(lr / c1) * (m / denominator), m, v
    return w - one(lr) * (m / one(c1) / denominator + one(decay) * w), m, v


def write(sim: Sim, directory: Path) -> Path:
    """Run `sim` and write its trace to `directory`."""
    writer = TraceWriter(directory)
    weights = {name: w.astype(np.float32).astype(sim.dtype) for name, w in start().items()}
    writer.initial(weights, ORDER)
    moment1 = {name: np.zeros_like(w) for name, w in weights.items()}
    moment2 = {name: np.zeros_like(w) for name, w in weights.items()}
    for step in range(1, sim.steps + 1):
        data = batch(sim, step)
        loss, gradients = loss_and_gradients(sim, weights, step)
        norm = float(np.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in gradients.values())))
        factor, lr, after = min(1.0, sim.clip / (norm + 1e-6)), sim.lr * sim.lr_factor, {}
        for name, w in weights.items():
            clipped = gradients[name] * w.dtype.type(factor)
            old = moment1[name], moment2[name]
            after[name], moment1[name], moment2[name] = adamw(
                sim, w, clipped, *old, step, lr, name in DECAYED
            )
        updates = {name: after[name] - w for name, w in weights.items()}
        if sim.frozen:
            after, updates = weights, {name: np.zeros_like(w) for name, w in weights.items()}
        weights = after
        logged = lr if sim.logs_true_lr else sim.lr
        writer.step(
            StepTrace(
                step, data, loss * 60, 60, norm, logged, **_planted(sim, step, gradients),
                updates=updates, moment1=dict(moment1), moment2=dict(moment2),
            )
        )  # fmt: skip
    return directory


def _planted(sim: Sim, step: int, gradients):
    gradients = dict(gradients)
    if step == sim.missing[0]:
        del gradients[sim.missing[1]]
    if sim.not_a_number and step == 2:
        gradients[sim.not_a_number] = gradients[sim.not_a_number] * np.nan
    return {"gradients": gradients}
