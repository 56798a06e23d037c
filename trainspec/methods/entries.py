"""Entries of the table that several methods make."""

from __future__ import annotations

from trainspec.params import Init, Param, UniformFanIn


def linear_entries(
    module: str,
    out: tuple[str, int],
    inner: tuple[str, int],
    init: tuple[Init, Init] | None = None,
    *,
    layer: int | None = None,
) -> list[Param]:
    """Weight [out, in] and bias [out]; both uniform in ±1/sqrt(in), torch's default, where nothing else is said."""
    weight, bias = init or (UniformFanIn(inner[1]), UniformFanIn(inner[1]))
    return [
        Param(f"{module}.weight", (out[1], inner[1]), (out[0], inner[0]), weight, True, "adapter", layer),
        Param(f"{module}.bias", (out[1],), (out[0],), bias, False, "adapter", layer),
    ]
