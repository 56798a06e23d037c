"""The causal order of a run's weights and activation points: the order in which the forward pass uses them.

The encoder of virtual tokens comes first; then the embedding, the layers, the final norm and the head. The family gives
the order of modules within a layer (`Family.within_layer`). A point comes after the weights that its value depends on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainspec.entry import Param
from trainspec.families import family_of
from trainspec.methods import ENCODER, PEFT_PREFIX, Method, full_table
from trainspec.model import ModelSpec
from trainspec.params import param_table
from trainspec.trace import Role, TraceName, activation_points

# The four sections of the order.
_ENCODER, _EMBEDDING, _LAYERS, _END = range(-1, 3)
_LSTM_LAYER = re.compile(r"_l(\d+)(?:_reverse)?$")
_POINT = re.compile(r"layers\.(\d+)\.")
Key = tuple[int, int, int, str]


def causal_order(model: ModelSpec, method: Method) -> tuple[TraceName, ...]:
    """Every weight of a run, frozen ones included, and every activation point, in causal order."""
    keyed = [*_weights(model, method), *_points(model)]
    return tuple(named for _, named in sorted(keyed, key=lambda each: each[0]))


def _weights(model: ModelSpec, method: Method) -> Iterator[tuple[Key, TraceName]]:
    roles: dict[str, Role] = {param.module: param.role for param in param_table(model)}
    modules: list[str] = []
    for param in full_table(model, method):
        plain = param.name.removeprefix(PEFT_PREFIX)
        named = TraceName(param.name, param.role, param.layer)
        if plain.startswith(f"{ENCODER}."):
            module, lstm = plain.split(".")[1], _LSTM_LAYER.search(plain)
            modules += [] if module in modules else [module]
            yield (_ENCODER, modules.index(module), int(lstm.group(1)) if lstm else 0, plain), named
        elif param.layer is not None:
            yield (_LAYERS, param.layer, _within(model, plain), plain), named
        else:
            yield _outside(_base_role(param, plain, roles), plain, is_point=False), named


def _points(model: ModelSpec) -> Iterator[tuple[Key, TraceName]]:
    for name in activation_points(model.layers):
        if layer := _POINT.match(name):
            i = int(layer.group(1))
            yield (_LAYERS, i, _within(model, name), name), TraceName(name, "point", i)
        else:
            role: dict[str, Role] = {"embedding": "embedding", "norm": "norm", "logits": "head"}
            yield _outside(role[name], name, is_point=True), TraceName(name, "point", None)


def _base_role(param: Param, plain: str, roles: dict[str, Role]) -> Role:
    """The role of a weight; for a low-rank pair, the role of the matrix it belongs to."""
    base = plain.rsplit(".", 2)[0]
    return roles.get(base, param.role) if param.role == "adapter" else param.role


def _within(model: ModelSpec, plain: str) -> int:
    """The position of a module or point in its layer, by the last known component of its name."""
    order = family_of(model).within_layer
    ranks = [order.index(word) for word in plain.split(".") if word in order]
    return ranks[-1] if ranks else len(order)


def _outside(role: Role, plain: str, *, is_point: bool) -> Key:
    if role == "embedding":
        return _EMBEDDING, 0, is_point, plain
    return _END, 0, 2 * (role == "head") + is_point, plain
