"""The causal order of a run's weights and activation points: the order in which the forward pass uses them.

The encoder of virtual tokens comes first; then the embedding, the layers, the final norm and the head. The family gives
the order of modules and points within a layer (`Family.within_layer`). A point comes after the weights that its value
depends on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from trainspec.entry import Param
from trainspec.families import family_of
from trainspec.methods import ENCODER, PEFT_PREFIX, Method, full_table
from trainspec.methods.virtual_tokens import PROMPT
from trainspec.model import ModelSpec
from trainspec.params import param_table
from trainspec.points import END_POINTS, LAYER_POINTS, Point
from trainspec.trace import Role, TraceName

# The four sections of the order.
_ENCODER, _EMBEDDING, _LAYERS, _END = range(-1, 3)
_LSTM_LAYER = re.compile(r"_l(\d+)(?:_reverse)?$")
# What the points outside of the layers are the output of.
_END_ROLES: dict[str, Role] = {"embedding": "embedding", "norm": "norm", "logits": "head"}


class Key(NamedTuple):
    """Sorts in causal order. `number` is a layer's or a module's, `within` a position in it; `part` is a part of the module
    at that position, such as lora_A.
    """

    section: int
    number: int
    within: int
    part: str
    is_point: bool
    name: str


def causal_order(model: ModelSpec, method: Method) -> tuple[TraceName, ...]:
    """Every weight of a run, frozen ones included, and every activation point, in causal order."""
    keyed = [*_weights(model, method)]
    for point in _points(model, method):
        keyed.append((_point_key(model, point), TraceName(point.full_name, "point", point.layer)))
    return tuple(named for _, named in sorted(keyed, key=lambda each: each[0]))


def activation_points(model: ModelSpec, method: Method) -> tuple[Point, ...]:
    """Every activation point of a run, in forward order."""
    return tuple(sorted(_points(model, method), key=lambda point: _point_key(model, point)))


def _points(model: ModelSpec, method: Method) -> Iterator[Point]:
    yield from (Point(name, axes) for name, axes in END_POINTS.items())
    own = {name: LAYER_POINTS[name] for name in family_of(model).within_layer if name in LAYER_POINTS}
    yield from (Point(name, axes, i) for i in range(model.layers) for name, axes in own.items())
    yield from method.points(model)


def _weights(model: ModelSpec, method: Method) -> Iterator[tuple[Key, TraceName]]:
    roles: dict[str, Role] = {param.module: param.role for param in param_table(model)}
    modules: list[str] = []
    for param in full_table(model, method):
        plain = param.name.removeprefix(PEFT_PREFIX)
        named = TraceName(param.name, param.role, param.layer)
        if plain.startswith(f"{ENCODER}."):
            module, lstm = plain.split(".")[1], _LSTM_LAYER.search(plain)
            modules += [] if module in modules else [module]
            number = int(lstm.group(1)) if lstm else 0
            yield Key(_ENCODER, modules.index(module), number, "", False, plain), named
        elif param.layer is not None:
            yield _in_layer(model, param.layer, plain, is_point=False), named
        else:
            yield _outside(_base_role(param, plain, roles), plain, is_point=False), named


def _point_key(model: ModelSpec, point: Point) -> Key:
    if point == PROMPT:  # after the whole encoder
        return Key(_EMBEDDING, 0, -1, "", True, point.name)
    if point.layer is not None:
        return _in_layer(model, point.layer, point.name, is_point=True)
    return _outside(_END_ROLES.get(point.name, "head"), point.name, is_point=True)


def _base_role(param: Param, plain: str, roles: dict[str, Role]) -> Role:
    """The role of a weight; for a low-rank pair, the role of the matrix it belongs to."""
    base = plain.rsplit(".", 2)[0]
    return roles.get(base, param.role) if param.role == "adapter" else param.role


def _in_layer(model: ModelSpec, layer: int, plain: str, *, is_point: bool) -> Key:
    """By the last module that the name has; what follows is a part of that, and a weight's own name."""
    order, words = family_of(model).within_layer, plain.split(".")
    known = [i for i, word in enumerate(words) if word in order and (is_point or word not in LAYER_POINTS)]
    if not known:
        return Key(_LAYERS, layer, len(order), "", is_point, plain)
    after = words[known[-1] + 1 :]
    part = ".".join(after if is_point else after[:-1])
    return Key(_LAYERS, layer, order.index(words[known[-1]]), part, is_point, plain)


def _outside(role: Role, plain: str, *, is_point: bool) -> Key:
    if role == "embedding":
        return Key(_EMBEDDING, 0, 0, "", is_point, plain)
    head = role == "head"
    # An adapter of the head: its parts come before the logits.
    part = (
        "~"
        if plain == "logits"
        else next((word for word in plain.split(".") if word.startswith("lora_")), "")
    )
    return Key(_END, 0, 2 * head, part if head else "", is_point, plain)
