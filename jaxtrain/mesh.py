"""The grid of devices that a plan asks for."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from trainspec.plans.plan import MESH_AXES, Plan


def make_mesh(plan: Plan) -> Mesh:
    """A mesh with all of MESH_AXES, those of size 1 too; the compiler shards whatever is not constrained."""
    shape, devices = [getattr(plan, axis) for axis in MESH_AXES], jax.devices()
    if len(devices) == plan.devices:
        # Neighbours on a TPU's torus are neighbours here.
        grid = mesh_utils.create_device_mesh(shape, devices)
    else:
        grid = np.array(devices[: plan.devices]).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
