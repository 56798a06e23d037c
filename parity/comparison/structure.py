"""What the names in two traces stand for: causal order, role in the model, layer.

A trace states it in its header (`trainspec.trace`, `causal_order`); a role of None is unknown. For a name in neither header it is guessed from the
name itself: a layer from its number, an embedding, a head or a method's encoder from the word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from trainspec.methods import ENCODER, PEFT_PREFIX
from trainspec.points import END_POINTS, LAYER_POINTS
from trainspec.trace import Role, TraceName

_LAYER = re.compile(r"(?:^|[./])(?:layers?|blocks?|h)[./_](\d+)(?:[./]|$)")
# Positions in a layer: weights come before points.
_POINTS_OF_A_LAYER = {name: 1 + i for i, name in enumerate(LAYER_POINTS)}
_KNOWN, _ENCODER, _EMBEDDING, _LAYERS, _END = range(5)


class Structure:
    """Causal order, roles and layers by name; the first of several orders that has a name decides."""

    def __init__(self, *orders: Sequence[TraceName]) -> None:
        entries: dict[str, TraceName] = {}
        for order in orders:
            for named in order:
                entries.setdefault(named.name, named)
        self._entries, self._order = entries, list(entries.values())
        self._rank = {name: i for i, name in enumerate(entries)}

    def key(self, name: str) -> tuple[int, int, int, list[str | int]]:
        """Sorts names in causal order; names in no order come last, sorted by what they suggest."""
        if name in self._rank:
            return _KNOWN, self._rank[name], 0, []
        kind, number, within = self._suggested(name.removeprefix(PEFT_PREFIX))
        return kind, number, within, natural(name.removeprefix(PEFT_PREFIX))

    def _suggested(self, plain: str) -> tuple[int, int, int]:
        """What a name in no order looks like: its kind, its layer, its position there."""
        if plain.startswith(f"{ENCODER}."):
            return _ENCODER, 0, 0
        if (layer := _layer_in(plain)) is not None:
            point = plain.rpartition(".")[2]
            return _LAYERS, layer, _POINTS_OF_A_LAYER.get(point, 0)
        if _is_embedding(plain):
            return _EMBEDDING, 0, int(plain in END_POINTS)
        is_head = "head" in plain or "logits" in plain
        return _END, 0, 2 * is_head + (plain in END_POINTS)

    def in_order(self, names: Iterable[str], *, backward: bool) -> list[str]:
        """`names` as the pass visits them: first to last layer, or the reverse."""
        return sorted(names, key=self.key, reverse=backward)

    def role(self, name: str) -> Role | None:
        """What a name is in the model; None if unknown."""
        if name in self._entries and self._entries[name].role:
            return self._entries[name].role
        return "embedding" if _is_embedding(name) and _layer_in(name) is None else None

    def in_any_layer(self, name: str) -> str:
        """`name` with the number of its layer left open: the same code computes all of them."""
        match = _LAYER.search(name)
        return f"{name[: match.start(1)]}*{name[match.end(1) :]}" if match else name

    def num_layers(self, names: Iterable[str]) -> int:
        """The number of layers that `names` belong to."""
        return len({self._layer(name) for name in names} - {None})

    def projection_before(self, name: str) -> str | None:
        """The module of the last projection before a weight in its layer; None if unknown."""
        for named in reversed(self._order[: self._rank.get(name, 0)]):
            if named.role == "linear" and named.layer == self._layer(name):
                return named.name.rpartition(".")[0]
        return None

    def notes(self, names: Iterable[str]) -> list[str]:
        """A note for the user if the causal order of some of `names` is unknown: what is used instead."""
        unknown = sorted(name for name in names if name not in self._entries)
        if not unknown:
            return []
        layers, embeddings = self.num_layers(unknown), [name for name in unknown if _is_embedding(name)]
        return [
            f"neither trace has a causal_order for {len(unknown)} of the weights, such as {unknown[0]}: they are compared by "
            f"the layer number in their names (of {layers or 'no'} layers; embeddings: {', '.join(embeddings) or 'none'}) and "
            "alphabetically within a layer, so the first divergence shown may not be the first in its layer"
        ]

    def _layer(self, name: str) -> int | None:
        known = self._entries.get(name)
        return known.layer if known and known.role else _layer_in(name)


def natural(name: str) -> list[str | int]:
    """Sorts text and numbers in turn, so that `h.10` comes after `h.2`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _layer_in(name: str) -> int | None:
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def _is_embedding(name: str) -> bool:
    return "embed" in name or "wte" in name
