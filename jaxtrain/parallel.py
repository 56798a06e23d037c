"""What belongs to the whole process: precision, devices and their mesh."""

from __future__ import annotations

import jax

from trainspec.plan import check_supported
from trainspec.recipe import Recipe


def start(recipe: Recipe) -> None:
    """Set this process up for the recipe, before JAX makes its first array. Raises PlanError."""
    check_supported(recipe.plan, recipe.precision.policy, "jax")
    jax.config.update("jax_enable_x64", recipe.precision.policy == "fp64")
    # On TPU a float32 matmul is a few bfloat16 passes unless told otherwise; on CPU this changes nothing.
    jax.config.update(
        "jax_default_matmul_precision", "highest" if recipe.precision.policy != "bf16" else "default"
    )


def finish() -> None:
    """The end of what `start` began. Differs from torchtrain: one process holds nothing that must be let go."""
