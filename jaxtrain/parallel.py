"""What belongs to the whole process and to all of them: precision, devices, their mesh, and what lies where on it."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from jax import Array, lax
from jax._src import distributed, xla_bridge
from jax._src.clusters import ClusterEnv
from jax.experimental import mesh_utils
from jax.extend.backend import clear_backends
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jaxtrain.tensor import Place
from jaxtrain.weights import native_name, native_spec
from trainspec.backends import BACKENDS
from trainspec.errors import PlanError
from trainspec.failures import outcome
from trainspec.params import Param
from trainspec.plans.accelerators import Devices, accelerators, hides_gpus
from trainspec.plans.plan import ACTIVATION_AXES, MESH_AXES, Plan, StateKind, weight_axes
from trainspec.recipe import Recipe
from trainspec.runs.run import Run, resolve_on

# A cluster that JAX does not find by itself: `HOST:PORT` of process 0, how many processes there are, and which is this.
_COORDINATOR, _PROCESSES, _PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# How long processes wait for each other: JAX's own patience.
_PATIENCE_SECONDS = 300.0
# How long a process that failed waits for the others, which mostly fail of the same.
_FAREWELL_SECONDS = 5.0
# XLA's CPU devices share one pool of threads, by default one for each device or core, and a thread that waits for the other
# devices of a sum holds its place. A device may have several sums under way: with all places taken by sums of which the
# others have no thread left to come, XLA aborts after 40 s.
_THREADS_PER_CPU_DEVICE = 8


class _Cluster(NamedTuple):
    """Where process 0 listens, how many processes there are, and which of them this is."""

    address: str
    processes: int
    number: int


_ALONE = _Cluster("", 1, 0)


def start(recipe: Recipe) -> Run:
    """The recipe's run, with this process set up for it, before JAX makes its first array. Raises PlanError."""
    run = resolve_on(recipe, BACKENDS["jax"])
    atexit.unregister(_leave)
    jax.config.update("jax_enable_x64", recipe.precision.policy == "fp64")
    # On TPU a float32 matmul is a few bfloat16 passes unless told otherwise; on CPU this changes nothing.
    jax.config.update(
        "jax_default_matmul_precision", "highest" if recipe.precision.policy != "bf16" else "default"
    )
    devices, processes = recipe.plan.devices, _join_cluster()
    _make_cpu_devices(devices, processes=processes)
    check_accelerators()
    available = jax.device_count()
    if available < devices or (processes > 1 and available != devices):
        raise PlanError(
            f"the plan takes {devices} devices, {processes} process(es) have {available} ({jax.default_backend()}); "
            "make plan.pipe × plan.data × plan.fsdp × plan.tensor what there is"
        )
    return run


def finish() -> None:
    """The end of what `start` began. Differs from torchtrain: JAX leaves its cluster when the process ends."""
    error = sys.exc_info()[1]
    if error is not None and jax.distributed.is_initialized():
        atexit.register(_leave, outcome(error)[0])


def _leave(code: int) -> None:
    """The end of a process that failed. JAX's own would wait five minutes for others that wait for this one."""
    client = distributed.global_state.client
    assert client is not None
    try:
        client.wait_at_barrier("failed", int(1000 * _FAREWELL_SECONDS))
    except jax.errors.JaxRuntimeError:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def check_accelerators() -> None:
    """Raises PlanError where this machine has a GPU or TPU that JAX cannot use, and nobody said to do without."""
    asked: str = jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # none of those that were asked for is there
        why = str(error) or "there is none"
        raise PlanError(f"JAX_PLATFORMS={asked}: {why}; set it to cpu to train on the cores") from None
    if backend != "cpu" or asked.split(",")[0] == "cpu":
        return
    for found in accelerators():
        if found.kind == "GPU" and hides_gpus(os.environ):
            continue
        platform, package = ("cuda", "jax[cuda13]") if found.kind == "GPU" else ("tpu", "jax[tpu]")
        try:
            jax.devices(platform)
        except RuntimeError as error:
            raise PlanError(
                f"{found}, and JAX cannot use it: {error}; pip install '{package}=={jax.__version__}', or what that says "
                "is missing, or set JAX_PLATFORMS=cpu to train on the cores"
            ) from None


def describe_devices(plan: Plan) -> Devices:
    """What a run with this plan computes on."""
    device = jax.local_devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    memory = None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")
    count, processes = jax.device_count(), jax.process_count()
    return Devices("jax", device.device_kind, plan.devices, count, processes, packages, memory)


def is_leader() -> bool:
    """Whether this is the one process that has the console and writes files. Takes no device, waits for nobody."""
    return _cluster().number == 0


def _cluster() -> _Cluster:
    """The processes of this run, whatever their plan is. Raises PlanError where they are named by halves."""
    if jax.distributed.is_initialized():
        joined = distributed.global_state
        return _Cluster(joined.coordinator_address or "", joined.num_processes, joined.process_id)
    named = [name for name in (_COORDINATOR, _PROCESSES, _PROCESS) if name in os.environ]
    if not named:
        return _found_cluster()
    if len(named) < 3:
        raise PlanError(f"{named[0]} is set: set {_COORDINATOR}, {_PROCESSES} and {_PROCESS} together")
    address, processes, index = (os.environ[name] for name in named)
    host, _, port = address.rpartition(":")
    numbers = all(number.isdecimal() for number in (port, processes, index))
    if not (host and numbers and 0 < int(port) < 2**16 and int(index) < int(processes)):
        raise PlanError(
            f"{_COORDINATOR}={address} {_PROCESSES}={processes} {_PROCESS}={index}: "
            "give HOST:PORT of process 0, how many processes there are, and a number below that"
        )
    return _Cluster(address, int(processes), int(index))


def _found_cluster() -> _Cluster:
    """What JAX finds by itself: a TPU pod, Slurm, Open MPI, Kubernetes. Its public way to ask would join at once."""
    try:
        address, processes, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(_PATIENCE_SECONDS)
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise PlanError(
            f"JAX sees a cluster and cannot read it ({error}); set {_COORDINATOR}, {_PROCESSES} and {_PROCESS} "
            f"({_PROCESSES}=1 for a process that is alone)"
        ) from None
    if address is None or processes is None or index is None:
        return _ALONE
    return _Cluster(address, processes, index)


def _join_cluster() -> int:
    """Join the other processes, where there are any; gives how many they are."""
    cluster = _cluster()
    if cluster.processes > 1 and not jax.distributed.is_initialized():
        if cluster.number > 0:
            _await_coordinator(cluster)
        try:
            jax.distributed.initialize(*cluster, initialization_timeout=int(_PATIENCE_SECONDS))
        except (RuntimeError, OSError) as error:
            raise PlanError(
                f"process {cluster.number} of {cluster.processes} cannot join the one at {cluster.address}: {error}"
            ) from None
    return cluster.processes


def _await_coordinator(cluster: _Cluster) -> None:
    """Wait until process 0 listens. XLA would abort where it does not: no exception, and a page of its own stack."""
    host, _, port = cluster.address.rpartition(":")
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise PlanError(
                    f"process {cluster.number} of {cluster.processes}: nobody answers at {cluster.address} "
                    f"({error.strerror or error}); start process 0 there, or correct {_COORDINATOR}"
                ) from None
        time.sleep(0.5)


def _make_cpu_devices(devices: int, *, processes: int) -> None:
    """On CPU any number of devices is a setting; it has no effect on a TPU or GPU."""
    local = devices // processes
    made: int = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if max(local, made) > 1:
        _make_room_for_threads(_THREADS_PER_CPU_DEVICE * max(local, made))
    if local <= max(made, 1):
        return
    if xla_bridge.backends_are_initialized():
        # An earlier run of this process made fewer.
        if jax.default_backend() != "cpu" or processes > 1 or jax.device_count() >= devices:
            return
        clear_backends()
    jax.config.update("jax_num_cpu_devices", local)


def _make_room_for_threads(threads: int) -> None:
    # The name is XLA's, which has no setting for it.
    os.environ["NPROC"] = str(max(threads, int(os.environ.get("NPROC") or os.cpu_count() or 1)))


def make_mesh(plan: Plan) -> Mesh:
    """All axes, also those of size 1, in the order of MESH_AXES; the compiler places what is not constrained."""
    shape, devices = [getattr(plan, axis) for axis in MESH_AXES], jax.devices()
    if len(devices) == plan.devices:
        # Neighbours on a TPU's torus are neighbours here.
        grid = mesh_utils.create_device_mesh(shape, devices)
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
        self.of: dict[StateKind, dict[str, NamedSharding]] = {
            part: {name: self._stacked(p, part) for name, p in self._rows.items()}
            for part in get_args(StateKind)
        }

    def place(self, name: str, *, is_trained: bool, dtype: np.dtype) -> Place:
        """How the model uses one layer of a weight, and where its gradient, of type `dtype`, is left."""
        param = self._rows[name]
        whole = native_spec(param, weight_axes(param, self._plan, over_fsdp=False))
        in_use, stored, left = (
            NamedSharding(self._mesh, spec)
            for spec in (whole, self._spec(param, "weights"), self._spec(param, "gradients"))
        )
        return Place(in_use, stored != in_use, left if is_trained else None, dtype)

    def constrain(self, x: Array, axes: tuple[str, ...]) -> Array:
        """An activation, its dimensions named by logical axes, split as the plan says."""
        return lax.with_sharding_constraint(x, self._activation(axes))

    def feed(self, array: NDArray[Any], axes: tuple[str, ...]) -> Array:
        """A device array of a host array that every process has whole; each takes its devices' part."""
        return jax.make_array_from_callback(
            array.shape, self._activation(axes), lambda index: array[index or ...]
        )

    def shape(self, shape: tuple[int, ...], axes: tuple[str, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        """What `feed` would give, without the numbers."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._activation(axes))

    def _activation(self, axes: tuple[str, ...]) -> NamedSharding:
        split = (tuple(a for a in ACTIVATION_AXES.get(axis, ()) if self._mesh.shape[a] > 1) for axis in axes)
        return NamedSharding(self._mesh, PartitionSpec(*(dim or None for dim in split)))

    def _spec(self, param: Param, part: StateKind) -> PartitionSpec:
        return native_spec(param, weight_axes(param, self._plan, over_fsdp=self._plan.splits(part)))

    def _stacked(self, param: Param, part: StateKind) -> NamedSharding:
        spec = self._spec(param, part)
        layers = "pipe" if self._plan.pipe > 1 else None
        return NamedSharding(self._mesh, spec if param.layer is None else PartitionSpec(layers, *spec))


def constrained(arrays: Mapping[str, Array], shardings: Mapping[str, NamedSharding]) -> dict[str, Array]:
    """`arrays`, each where `shardings` has its name."""
    return {name: lax.with_sharding_constraint(array, shardings[name]) for name, array in arrays.items()}
