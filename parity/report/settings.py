"""Both sides' settings beside each other: the recipes that they trained, and what their traces say they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from trainspec.trace import Trace
from trainspec.trace_header import TraceHeader

# How a digest is shortened; two that differ do so in these.
DIGEST_CHARACTERS = 12
# What a header has that the recipe says as well, and what belongs to one backend alone.
IN_THE_RECIPE = ("policy", "reduce", "plan", "method", "first_step")


@dataclass(frozen=True)
class Setting:
    """A setting and its value on each side; None where a side has no such setting."""

    name: str
    left: str | None
    right: str | None

    @property
    def differs(self) -> bool:
        """Whether the sides differ in it."""
        return self.left != self.right


def settings_of(recipes: Sequence[str], traces: tuple[Trace, Trace] | None) -> list[Setting]:
    """Every field of both recipes (YAML), in their order; without recipes what the traces' headers state."""
    if recipes:
        left, right = (dict(_flat(yaml.safe_load(text) or {})) for text in recipes)
        return _beside(left, right)
    left, right = _stated(traces)
    return _beside(left, right)


def origins_of(traces: tuple[Trace, Trace] | None) -> list[Setting]:
    """What each run was made with: backend, versions, digests of the contents."""
    left, right = _stated(traces)
    return [s for s in _beside(left, right) if s.name.split(".")[0] not in IN_THE_RECIPE]


def _stated(traces: tuple[Trace, Trace] | None) -> tuple[dict[str, str], dict[str, str]]:
    if traces is None:
        return {}, {}
    left, right = (dict(_flat(_known(trace.header))) for trace in traces)
    return left, right


def _known(header: TraceHeader | None) -> dict[str, Any]:
    stated = {key: value for key, value in asdict(header or TraceHeader()).items() if value not in (None, {})}
    if "identity" in stated:
        stated["identity"] = {key: digest[:DIGEST_CHARACTERS] for key, digest in stated["identity"].items()}
    return stated


def _beside(left: Mapping[str, str], right: Mapping[str, str]) -> list[Setting]:
    return [Setting(name, left.get(name), right.get(name)) for name in dict.fromkeys((*left, *right))]


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """`(optimizer.lr, 0.01)` and so on."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, "null" if tree is None else str(tree)
