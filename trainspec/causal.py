"""The causal order of a run: which weight and which activation point comes before which, as data flows.

Virtual tokens are made first; then come the embedding, the layers from the first to the last, the final norm and the
head. Within a layer the family says the order of modules (`Family.within_layer`). A point comes after the weights that
make it.
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

# The four parts of a run.
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
    parts: list[str] = []
    for param in full_table(model, method):
        plain = param.name.removeprefix(PEFT_PREFIX)
        named = TraceName(param.name, param.role, param.layer)
        if plain.startswith(f"{ENCODER}."):
            part, lstm = plain.split(".")[1], _LSTM_LAYER.search(plain)
            parts += [] if part in parts else [part]
            yield (_ENCODER, parts.index(part), int(lstm.group(1)) if lstm else 0, plain), named
        elif param.layer is not None:
            yield (_LAYERS, param.layer, _within(model, plain), plain), named
        else:
            yield _outside(_role_beside(param, plain, roles), plain, is_point=False), named


def _points(model: ModelSpec) -> Iterator[tuple[Key, TraceName]]:
    for name in activation_points(model.layers):
        if layer := _POINT.match(name):
            i = int(layer.group(1))
            yield (_LAYERS, i, _within(model, name), name), TraceName(name, "point", i)
        else:
            role: dict[str, Role] = {"embedding": "embedding", "norm": "norm", "logits": "head"}
            yield _outside(role[name], name, is_point=True), TraceName(name, "point", None)


def _role_beside(param: Param, plain: str, roles: dict[str, Role]) -> Role:
    """The role of a weight, or that of the matrix which a low-rank pair belongs to."""
    base = plain.rsplit(".", 2)[0]
    return roles.get(base, param.role) if param.role == "adapter" else param.role


def _within(model: ModelSpec, plain: str) -> int:
    """Where in a layer a module or point stands; the last part of a name that is known says it."""
    order = family_of(model).within_layer
    ranks = [order.index(part) for part in plain.split(".") if part in order]
    return ranks[-1] if ranks else len(order)


def _outside(role: Role, plain: str, *, is_point: bool) -> Key:
    if role == "embedding":
        return _EMBEDDING, 0, is_point, plain
    return _END, 0, 2 * (role == "head") + is_point, plain
