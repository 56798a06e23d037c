"""The types of a run's numbers: in which sums are made, and how exact matrix products are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
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
