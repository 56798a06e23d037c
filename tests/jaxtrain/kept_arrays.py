"""What functions of `layers` keep for their backward pass, as JSON: python tests/jaxtrain/kept_arrays.py CASES.json OUT.json

CASES are ignored. OUT has of each type and function, as it is and undecorated: `kept`, the types of the full-size arrays that its
vjp holds; `off`, how many results are not the float64 ones, rounded; and its `program`.
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

from jaxtrain.layers import rotate, swiglu
from jaxtrain.precision import computed_wide

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


def main() -> None:
    """Write OUT."""
    jax.config.update("jax_enable_x64", True)
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal(SHAPE).astype(jnp.bfloat16)) for _ in range(3)]
    found: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32", "float64"):
        for function, count in ((swiglu, 2), (rotate, 3), (norm, 1)):
            arguments, wide = ([a.astype(t) for a in arrays[:count]] for t in (dtype, "float64"))
            plain, exact = function.__wrapped__, function(*wide)  # pyright: ignore[reportFunctionMemberAccess]
            name = function.__name__
            found[f"{dtype} {name}"] = facts(function, arguments, exact)
            found[f"{dtype} {name} undecorated"] = facts(plain, arguments, exact)
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
