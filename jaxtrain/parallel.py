"""What belongs to the whole process and to all of them: precision, devices, their mesh, and what lies where on it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import numpy as np
from jax import Array, lax
from jax.experimental import mesh_utils
from jax.extend.backend import clear_backends
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from jaxtrain.tensor import Place
from jaxtrain.weights import native_name, native_spec
from trainspec.errors import PlanError
from trainspec.loop import check_plan
from trainspec.params import Param
from trainspec.plan import ACTIVATION_AXES, MESH_AXES, Part, Plan, weight_axes
from trainspec.recipe import Recipe

# A cluster that JAX does not find by itself: `HOST:PORT` of process 0, how many processes there are, and which is this.
_COORDINATOR, _PROCESSES, _PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def start(recipe: Recipe) -> None:
    """Set this process up for the recipe, before JAX makes its first array. Raises PlanError."""
    check_plan(recipe, "jax")
    jax.config.update("jax_enable_x64", recipe.precision.policy == "fp64")
    # On TPU a float32 matmul is a few bfloat16 passes unless told otherwise; on CPU this changes nothing.
    jax.config.update(
        "jax_default_matmul_precision", "highest" if recipe.precision.policy != "bf16" else "default"
    )
    devices = recipe.plan.devices
    if devices > 1:
        _join_cluster()
        _make_cpu_devices(devices)
    available, processes = jax.device_count(), jax.process_count()
    if available < devices or (processes > 1 and available != devices):
        raise PlanError(
            f"the plan takes {devices} devices, {processes} process(es) have {available} ({jax.default_backend()}); "
            "make plan.data × plan.fsdp × plan.tensor what there is"
        )


def finish() -> None:
    """The end of what `start` began. Differs from torchtrain: JAX leaves its cluster when the process ends."""


def is_leader() -> bool:
    """Whether this is the one process that has the console and writes files."""
    return jax.process_index() == 0


def _join_cluster() -> None:
    """Join the other processes, where there are any. JAX finds TPU pods, Slurm, Open MPI and Kubernetes itself."""
    if jax.distributed.is_initialized():
        return
    named = [name for name in (_COORDINATOR, _PROCESSES, _PROCESS) if name in os.environ]
    if named and len(named) < 3:
        raise PlanError(f"{named[0]} is set: set {_COORDINATOR}, {_PROCESSES} and {_PROCESS} together")
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo" if named else None)
        if named:
            count, index = int(os.environ[_PROCESSES]), int(os.environ[_PROCESS])
            jax.distributed.initialize(os.environ[_COORDINATOR], count, index)
        else:
            jax.distributed.initialize()
    except ValueError:
        if named:
            raise PlanError(
                f"{_COORDINATOR}, {_PROCESSES}, {_PROCESS}: not HOST:PORT and two numbers"
            ) from None
        # JAX found no cluster: this process is alone.
    except RuntimeError:
        if named:
            raise
        # Devices were used before, by an earlier run of this process: it is alone.


def _make_cpu_devices(devices: int) -> None:
    """On CPU any number of devices is a setting; it has no effect on a TPU or GPU."""
    local = devices // int(os.environ.get(_PROCESSES, "1"))
    made: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if made >= local:
        return
    try:
        jax.config.update("jax_num_cpu_devices", local)
    except RuntimeError:  # an earlier run of this process made fewer
        if jax.default_backend() == "cpu" and jax.device_count() < devices and jax.process_count() == 1:
            clear_backends()
            jax.config.update("jax_num_cpu_devices", local)


def make_mesh(plan: Plan) -> Mesh:
    """All axes, also those of size 1, in the order of MESH_AXES; the compiler places what is not constrained."""
    shape, devices = [getattr(plan, axis) for axis in MESH_AXES], jax.devices()
    if len(devices) == plan.devices:
        grid = mesh_utils.create_device_mesh(
            shape, devices
        )  # neighbours on a TPU's torus are neighbours here
    else:
        grid = np.array(devices[: plan.devices]).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


class Layout:
    """What lies where. `of[part][name]` is the sharding of a native array (layers in front) in that part of the state:
    one tree of specs each for weights, gradients and optimizer, and `shards` is nothing else (docs/decisions/0009).
    """

    def __init__(self, mesh: Mesh, plan: Plan, table: Sequence[Param]) -> None:
        self._mesh, self._plan = mesh, plan
        self._rows = {native_name(p)[0]: p for p in table}
        self.of: dict[Part, dict[str, NamedSharding]] = {
            part: {name: self._stacked(p, part) for name, p in self._rows.items()} for part in get_args(Part)
        }

    def place(self, name: str, *, is_trained: bool, dtype: np.dtype) -> Place:
        """How the model uses one layer of a weight, and where its gradient, of type `dtype`, is left."""
        param = self._rows[name]
        in_use = NamedSharding(
            self._mesh, native_spec(param, weight_axes(param, self._plan, over_fsdp=False))
        )
        stored = NamedSharding(self._mesh, self._spec(param, "weights"))
        gradient = NamedSharding(self._mesh, self._spec(param, "gradients")) if is_trained else None
        return Place(in_use, stored != in_use, gradient, dtype)

    def constrain(self, x: Array, axes: tuple[str, ...]) -> Array:
        """An activation, its dimensions named by logical axes, split as the plan says."""
        return lax.with_sharding_constraint(x, self._activation(axes))

    def feed(self, array: NDArray[Any], axes: tuple[str, ...]) -> Array:
        """A device array of a host array that every process has whole; each takes its devices' part."""
        return jax.make_array_from_callback(
            array.shape, self._activation(axes), lambda index: array[index or ...]
        )

    def _activation(self, axes: tuple[str, ...]) -> NamedSharding:
        split = (tuple(a for a in ACTIVATION_AXES.get(axis, ()) if self._mesh.shape[a] > 1) for axis in axes)
        return NamedSharding(self._mesh, PartitionSpec(*(dim or None for dim in split)))

    def _spec(self, param: Param, part: Part) -> PartitionSpec:
        return native_spec(param, weight_axes(param, self._plan, over_fsdp=self._plan.splits(part)))

    def _stacked(self, param: Param, part: Part) -> NamedSharding:
        spec = self._spec(param, part)
        return NamedSharding(self._mesh, spec if param.layer is None else PartitionSpec(None, *spec))


def constrained(arrays: Mapping[str, Array], shardings: Mapping[str, NamedSharding]) -> dict[str, Array]:
    """`arrays`, each where `shardings` has its name."""
    return {name: lax.with_sharding_constraint(array, shardings[name]) for name, array in arrays.items()}
