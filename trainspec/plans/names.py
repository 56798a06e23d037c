"""The names that a command line may say of a plan. Light: a command line is parsed before anything heavy is imported."""

from __future__ import annotations

from typing import Literal, get_args

# The names of `trainspec.backends.BACKENDS`.
Backend = Literal["jax", "torch"]
Policy = Literal["fp64", "fp32", "bf16"]
# The words of `plan.attention`.
AttentionChoice = Literal["auto", "reference", "fused"]
DeviceKind = Literal["cpu", "gpu", "tpu"]
# What a user may ask for; `auto` is what a backend takes by itself.
Device = DeviceKind | Literal["auto"]
DEVICES = (*get_args(DeviceKind), "auto")
