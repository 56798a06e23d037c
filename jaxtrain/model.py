"""The model of a run, as its family defines it."""

from __future__ import annotations

import jax.numpy as jnp

from jaxtrain.decoder import Decoder, is_worth_unrolling
from jaxtrain.families import FAMILIES
from jaxtrain.layers import Attend, Build
from jaxtrain.sharding import Constrain
from trainspec.model import ModelSpec
from trainspec.plans.plan import COMPUTE_DTYPE, Policy


def build_model(
    spec: ModelSpec, *, policy: Policy, remat: str, constrain: Constrain, attend: Attend, platform: str
) -> Decoder:
    """The abstract model of a program for `platform`; its arrays are made by `weights.from_canonical`.

    The model calls `constrain(x, axes)` with the logical axis of each dimension of an activation x, and `attend` for attention.
    """
    build = Build(jnp.dtype(COMPUTE_DTYPE[policy]), constrain, attend)
    model = FAMILIES[spec.family](spec, remat=remat, build=build)
    model.unrolls = is_worth_unrolling(spec, platform=platform)
    return model
