"""The types of a run's numbers: in which sums are made, and how exact matrix products are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from trainspec.plans.plan import Policy


def use_precision(policy: Policy) -> None:
    """Set JAX up for a policy, before it makes its first array."""
    jax.config.update("jax_enable_x64", policy == "fp64")
    # On TPU a float32 matmul is a few bfloat16 passes unless told otherwise; on CPU this changes nothing.
    jax.config.update("jax_default_matmul_precision", "highest" if policy != "bf16" else "default")


def accumulation_dtype(dtype: DTypeLike) -> np.dtype:
    """The type in which sums of `dtype` are made (norms, softmax, loss): float32, or float64 for float64."""
    return jnp.promote_types(jnp.float32, dtype)


def computed_wide(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` of arrays of one type, computed in their accumulation type and rounded to theirs at its end only.

    Nothing but its arguments is kept for its backward pass, which computes it again: what autodiff would keep besides is more, and
    of the wider type. In float64, which bounds and proofs are made with, it is `function` itself.
    """

    def narrow(*arrays: Array) -> Array:
        return function(*map(in_accumulation_type, arrays)).astype(arrays[0].dtype)

    again = jax.checkpoint(narrow, prevent_cse=False)

    @wraps(function)
    def run(*arrays: Array) -> Array:
        return function(*arrays) if arrays[0].dtype == jnp.float64 else again(*arrays)

    return run


def in_accumulation_type(x: Array) -> Array:
    """x in the type in which sums of it are made."""
    return x.astype(accumulation_dtype(x.dtype))


def wide_product(subscripts: str, x: Array, y: Array) -> Array:
    """The contraction (`jnp.einsum`) of x and y, summed and returned in their accumulation type."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=accumulation_dtype(x.dtype))


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's processor has instructions for products of bfloat16 matrices that are worth using: AMX."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_bf16" in facts.split()
