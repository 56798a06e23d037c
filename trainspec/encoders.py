"""What makes virtual tokens, in numpy and float64: the encoders of P-tuning and of a projected prefix, and none.

PEFT's files hold what an encoder gives, not the encoder; this makes it from the trained rows on the leader, whatever
the backend. Sources: PEFT's PromptEncoder and PrefixEncoder; the LSTM's equations are those of torch.nn.LSTM.
"""

# V virtual tokens, H hidden width

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainspec.methods import ENCODER, LSTM_LAYERS, Method, PrefixTuning, PTuning, Virtual

Array = NDArray[Any]


def has_encoder(method: Method) -> bool:
    """Whether something stands between the trained embeddings and the virtual tokens."""
    return isinstance(method, PTuning) or (isinstance(method, PrefixTuning) and method.projection)


def encode(method: Virtual, weights: Mapping[str, Array]) -> Array:
    """The virtual tokens [V, width] that the method's rows, by canonical name, make; without dropout, in float64.

    The width is the model's, or of a prefix that of all keys and values: (2 layer, + 1 for the value, kv head, dim).
    """
    rows = {name: array.astype(np.float64) for name, array in weights.items()}
    x = rows[f"{ENCODER}.embedding.weight"]
    match method:
        case PTuning(encoder="mlp"):
            x = np.maximum(_linear(rows, "mlp_head.0", x), 0)
            x = np.maximum(_linear(rows, "mlp_head.2", x), 0)
            return _linear(rows, "mlp_head.4", x)
        case PTuning():
            for layer in range(LSTM_LAYERS):
                backwards = _lstm(rows, f"l{layer}_reverse", x[::-1])[::-1]
                x = np.concatenate([_lstm(rows, f"l{layer}", x), backwards], axis=-1)
            return _linear(rows, "mlp_head.2", np.maximum(_linear(rows, "mlp_head.0", x), 0))
        case PrefixTuning(projection=True):
            return _linear(rows, "transform.2", np.tanh(_linear(rows, "transform.0", x)))
        case _:
            return x


def _linear(rows: Mapping[str, Array], module: str, x: Array) -> Array:
    return x @ rows[f"{ENCODER}.{module}.weight"].T + rows[f"{ENCODER}.{module}.bias"]


def _lstm(rows: Mapping[str, Array], which: str, x_VI: Array) -> Array:
    """One direction of one layer, [V, H]; gates in torch's order: input, forget, cell, output."""
    of_input, of_state, bias_input, bias_state = (
        rows[f"{ENCODER}.lstm_head.{leaf}_{which}"]
        for leaf in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden = cell = np.zeros(of_state.shape[1])
    found = []
    for x_I in x_VI:
        gates = of_input @ x_I + bias_input + of_state @ hidden + bias_state
        i, f, g, o = np.split(gates, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        found.append(hidden)
    return np.stack(found)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), by way of a function that never overflows."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))
