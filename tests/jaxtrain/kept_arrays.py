"""What functions of `layers` keep for their backward pass, as JSON: python tests/jaxtrain/kept_arrays.py CASES.json OUT.json

CASES are ignored. OUT has of each type and function, as it is, step by step in that type, and by autodiff: `kept`, the types of
the full-size arrays that its vjp holds; `off`, how many results are not the float64 ones, rounded; and its `program`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain import weight_ops
from jaxtrain.layers import rotate, swiglu
from jaxtrain.precision import computed_wide, in_accumulation_type

SHAPE = (2, 16, 4, 8)


@computed_wide
def norm(x: Array) -> Array:
    """The sums and the root of RMSNorm."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def facts(function: Callable[..., Array], arguments: Sequence[Array], exact: Array) -> dict[str, Any]:
    """Of one function and type."""
    result, vjp = jax.vjp(function, *arguments)
    kept = [a.dtype.name for a in jax.tree.leaves(vjp) if a.shape == SHAPE]
    expected = np.asarray(exact).astype(result.dtype)
    return {
        "kept": sorted(kept),
        "off": int(np.sum(np.asarray(result) != expected)),
        "program": str(jax.make_jaxpr(function)(*arguments)),
    }


def autodiff(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` computed as wide, by what autodiff makes of it."""

    def run(*arguments: Array) -> Array:
        return function(*map(in_accumulation_type, arguments)).astype(arguments[0].dtype)

    return run


def products(arguments: Sequence[Array]) -> dict[str, Any]:
    """A product and its sums over rows, for each kind of processor: the program that is compiled, and the results."""
    x, w = arguments[0].reshape(4, -1, 8), arguments[1].reshape(-1, 8).T
    here = NamedSharding(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1]), PartitionSpec())
    like = jax.ShapeDtypeStruct(
        (8, 8), arguments[0].dtype if arguments[0].dtype.itemsize > 4 else "float32", sharding=here
    )
    found: dict[str, Any] = {}
    for multiplies in (True, False):
        weight_ops.cpu_multiplies_bfloat16 = lambda answer=multiplies: answer
        # A new function each time: JAX would give what it has traced before.
        for name, run in (
            ("product", lambda x, w: weight_ops._product(x, w, "cpu")),
            ("product for a TPU", lambda x, w: weight_ops._product(x, w, "tpu")),
            ("sums", lambda x, w: weight_ops._sum_of_products(x, x, like)),
        ):
            key = f"{name} {'with' if multiplies else 'without'} instructions"
            found[f"{key} program"] = jax.jit(run).lower(x, w).as_text()
            found[key] = np.asarray(run(x, w), np.float64).ravel().tolist()
    return found


def main() -> None:
    """Write OUT."""
    jax.config.update("jax_enable_x64", True)
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal(SHAPE).astype(jnp.bfloat16)) for _ in range(3)]
    found: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32", "float64"):
        found[f"{dtype} products"] = products([a.astype(dtype) for a in arrays])
        for function, count in ((swiglu, 2), (rotate, 3), (norm, 1)):
            arguments, wide = ([a.astype(t) for a in arrays[:count]] for t in (dtype, "float64"))
            plain, exact = function.__wrapped__, function(*wide)  # pyright: ignore[reportFunctionMemberAccess]
            name = f"{dtype} {function.__name__}"
            found[name] = facts(function, arguments, exact)
            found[f"{name} step by step"] = facts(plain, arguments, exact)
            found[f"{name} by autodiff"] = facts(autodiff(plain), arguments, exact)
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
