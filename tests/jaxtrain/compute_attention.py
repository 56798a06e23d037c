"""How far kernels of attention are from the reference, in the result and all gradients, as JSON.

    python tests/jaxtrain/compute_attention.py CASES.json OUT.json      CASES: {name: fields of `Case`}

OUT has for each case the largest difference of each array, relative to its largest entry.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxtrain.attention import blocks, cudnn, reference, splash
from jaxtrain.attention.devices import on_each_device
from jaxtrain.attention.visible import Visible
from jaxtrain.layers import VIRTUAL
from trainspec.plans.plan import MESH_AXES

SPLIT = (2, 2, 1, 2)


@dataclass(frozen=True)
class Case:
    """Rows of `tokens` and a kernel. With `split` they are the microbatches of two stages, on eight devices.

    `wrong` are facts that only the kernel is told, and `reads_padding` says that what it makes of padding counts too.
    """

    kernel: str
    dtype: str = "float64"
    rows: str = "packed"
    tokens: int = 40
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 12
    prefix: int = 0
    prompt: int = 0
    window: int | None = None
    prefix_has_positions: bool = True
    split: bool = False
    reads_padding: bool = True
    wrong: dict[str, Any] = field(default_factory=dict)

    def visible(self, segments: np.ndarray, positions: np.ndarray) -> Visible:
        return Visible(
            segments_BS=jnp.asarray(segments),
            positions_BS=jnp.asarray(positions),
            prompt=self.prompt,
            prefix=self.prefix,
            window=self.window,
            prefix_has_positions=self.prefix_has_positions,
            is_recorded=self.reads_padding,
        )


def rows_of(case: Case, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of two rows, with those of a prompt, after a prefix."""
    segments, positions = np.zeros((2, 2, case.tokens), np.int32)
    for row in range(2):
        empty = int(random.integers(1, case.tokens // 4)) if case.rows != "whole" else 0
        begin, end = (empty, case.tokens) if case.rows == "left" else (0, case.tokens - empty)
        cuts = (
            sorted(random.choice(np.arange(begin + 1, end), 3, replace=False))
            if case.rows == "packed"
            else []
        )
        for number, (first, last) in enumerate(zip([begin, *cuts], [*cuts, end], strict=True), 1):
            segments[row, first:last] = number
            positions[row, first:last] = np.arange(last - first)
    shift = case.prompt + case.prefix * case.prefix_has_positions
    leading = np.broadcast_to(np.arange(case.prompt, dtype=np.int32), (2, case.prompt))
    return (
        np.concatenate([np.full_like(leading, VIRTUAL), segments], axis=1),
        np.concatenate([leading, positions + shift], axis=1),
    )


def kernel_of(name: str, rows: str) -> Callable[..., jax.Array]:
    return {
        "blocks": blocks.attend,
        "cudnn": partial(cudnn.attend, has_causal_rows=rows == "right", implementation="xla"),
        "splash": partial(splash.attend, interpret=True),
    }[name]


def found(case: Case) -> dict[str, float]:
    random = np.random.default_rng(0)
    stages = [rows_of(case, random) for _ in range(2 if case.split else 1)]
    segments, positions = (np.stack(x) for x in zip(*stages, strict=True))
    length = segments.shape[2]

    def drawn(length: int, heads: int) -> jax.Array:
        shape = (*segments.shape[:2], length, heads, case.head_dim)
        return jnp.asarray(random.standard_normal(shape), case.dtype)

    keys = case.prefix + length
    q, k, v = drawn(length, case.heads), drawn(keys, case.kv_heads), drawn(keys, case.kv_heads)
    d_mixed = drawn(length, case.heads)
    counts = (segments != 0) | case.reads_padding
    d_mixed = jnp.where(counts[..., None, None], d_mixed, 0)
    told = replace(case, **case.wrong)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, d_mixed: jax.Array) -> tuple[Any, Any]:
        return tuple(
            made(attend, facts, q, k, v, d_mixed)
            for attend, facts in ((kernel, told), (reference.attend, case))
        )

    def made(attend: Any, facts: Case, q: jax.Array, k: jax.Array, v: jax.Array, d_mixed: jax.Array) -> Any:
        def mixed(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            def of_stage(q: Any, k: Any, v: Any, segments: Any, positions: Any) -> jax.Array:
                return attend(q, k, v, facts.visible(segments, positions))

            return jax.vmap(of_stage, spmd_axis_name="pipe")(q, k, v, segments, positions)

        result, vjp = jax.vjp(mixed, q, k, v)
        return jnp.where(counts[..., None, None], result, 0), *vjp(d_mixed)

    kernel = kernel_of(case.kernel, case.rows)
    if case.split:
        grid = np.array(jax.devices()[:8]).reshape(SPLIT)
        kernel = on_each_device(kernel, Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 4))
    mine, theirs = jax.jit(both)(q, k, v, d_mixed)
    return {
        name: float(jnp.max(jnp.abs(a - b).astype(float)) / jnp.max(jnp.abs(b).astype(float)))
        for name, a, b in zip(("mixed", "q", "k", "v"), mine, theirs, strict=True)
    }


def main() -> None:
    cases, out = map(Path, sys.argv[1:])
    errors = {}
    for name, fields in json.loads(cases.read_text()).items():
        case = Case(**fields)
        jax.config.update("jax_enable_x64", case.dtype == "float64")
        blocks.SECTIONS = 2  # so that short rows have sections of several blocks
        errors[name] = found(case)
    out.write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
