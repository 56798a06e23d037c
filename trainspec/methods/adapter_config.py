"""Whether the settings in an adapter's `adapter_config.json` are those of the recipe's method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainspec.errors import WeightsError
from trainspec.methods.method import ADAPTER_CONFIG, MethodSpec


def check_type(directory: Path, config: Mapping[str, Any], method: MethodSpec, types: Sequence[str]) -> None:
    """Raises WeightsError where an adapter has none of PEFT's `types`."""
    if config.get("peft_type") not in types:
        raise WeightsError(
            f"{directory}: peft_type {config.get('peft_type')!r}; method.kind={method.kind} starts from "
            f"{' or '.join(types)} only"
        )


def check_setting(
    directory: Path,
    config: Mapping[str, Any],
    method: MethodSpec,
    key: str,
    mine: object,
    *,
    field: str | None = None,
) -> None:
    """Raises WeightsError where the adapter's `key` is not `mine`; `field` is the method's name for it, if another."""
    theirs = config.get(key)
    if theirs is None:
        raise WeightsError(
            f"{directory / ADAPTER_CONFIG}: no {key}; it is not a {type(method).__name__} configuration"
        )
    if type(theirs) is not type(mine) and (isinstance(mine, str | bool) or not is_number(theirs)):
        raise WeightsError(f"{directory / ADAPTER_CONFIG}: {key} is {theirs!r:.80}, the recipe says {mine!r}")
    if theirs != mine:
        value = str(theirs).lower() if isinstance(theirs, str | bool) else theirs
        raise WeightsError(
            f"{directory}: {key}={theirs}, the recipe says {mine}; set method.{field or key}={value}"
        )


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a number; `true` is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
