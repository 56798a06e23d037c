"""The names that a command line may say of a plan. Light: a command line is parsed before anything heavy is imported."""

from __future__ import annotations

from typing import Literal

# The names of `trainspec.backends.BACKENDS`.
Backend = Literal["jax", "torch"]
Policy = Literal["fp64", "fp32", "bf16"]
