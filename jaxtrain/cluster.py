"""The processes of a run and their devices: joining the others, checking what hardware is there, and leaving."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain import _jax
from jaxtrain.compilation import use_cache
from jaxtrain.precision import use_precision
from trainspec.backends import BACKENDS
from trainspec.errors import PlanError
from trainspec.failures import outcome
from trainspec.plans.accelerators import Devices, accelerators, hides_gpus
from trainspec.plans.names import DeviceKind
from trainspec.plans.plan import Plan
from trainspec.recipe import Recipe
from trainspec.runs.allocator import keep_freed_memory
from trainspec.runs.processes import Processes
from trainspec.runs.run import Run, resolve_on

# For a cluster that JAX does not detect: `HOST:PORT` of process 0, the number of processes, and the index of this one.
_COORDINATOR, _PROCESSES, _PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# How long processes wait for each other: JAX's own patience.
_PATIENCE_SECONDS = 300.0
# After this long without a sign of life JAX takes a process for dead, and ends the others.
_HEARTBEAT_SECONDS = 60.0
# How long a process that failed waits for the others, which mostly fail for the same reason.
_FAREWELL_SECONDS = 5.0
# XLA's CPU devices share one pool of threads, by default one per device or core, and a thread that waits for the other
# devices of an all-reduce stays busy. A device may have several under way: if these take every thread, no other device
# can join them, and XLA aborts after 40 s.
_THREADS_PER_CPU_DEVICE = 8
# The exit code of the run that this process failed in, if it did.
_failed: list[int] = []


class _Cluster(NamedTuple):
    """`HOST:PORT` of process 0, the number of processes, and the index of this one."""

    address: str
    processes: int
    process: int


_ALONE = _Cluster("", 1, 0)


def start(recipe: Recipe) -> Run:
    """The recipe's run, with this process set up for it. Raises PlanError, also for an unsupported plan."""
    run = resolve_on(recipe, BACKENDS["jax"])
    set_up(run)
    return run


def set_up(run: Run) -> None:
    """Set this process up for a run, before JAX makes its first array.

    Raises PlanError if the devices that are there do not fit the plan.
    """
    recipe = run.recipe
    _failed.clear()
    use_precision(recipe.precision.policy)
    use_cache()
    cluster = _cluster()
    if cluster.process == 0:
        _jax.report_version()
    _join(cluster)
    devices, processes = recipe.plan.devices, cluster.processes
    _make_cpu_devices(devices, processes=processes)
    check_accelerators()
    if jax.default_backend() == "cpu":
        keep_freed_memory(in_one_arena=True)
    available = jax.device_count()
    if available < devices or (processes > 1 and available != devices):
        raise PlanError(
            f"the plan takes {devices} devices, {processes} process(es) have {available} ({jax.default_backend()}); "
            "make plan.pipe × plan.data × plan.fsdp × plan.tensor what there is"
        )


def finish() -> None:
    """End what `set_up` began. Differs from torchtrain: JAX leaves its cluster when the process ends."""
    error = sys.exc_info()[1]
    if error is not None and jax.distributed.is_initialized():
        if not _failed:
            _at_exit(_leave)
        _failed[:] = [outcome(error)[0]]


def _at_exit(leave: Callable[[], None]) -> None:
    """Have `leave` called when the main thread has ended.

    atexit is too late: before its functions Python waits for the threads of every pool, of which one of orbax's may wait for
    a process that is gone.
    """
    threading._register_atexit(leave)  # type: ignore[attr-defined]


def _leave() -> None:
    """End a process that failed. JAX's own way would wait five minutes for others that wait for this one."""
    if not _failed:
        return
    try:
        _jax.wait_at_barrier("failed", _FAREWELL_SECONDS)
    except jax.errors.JaxRuntimeError:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_failed[0])


def check_accelerators() -> None:
    """Raises PlanError if this machine has a GPU or TPU that JAX cannot use, and the user did not ask for the CPU."""
    asked: str = _jax.setting("jax_platforms") or ""
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # none of the platforms asked for is there
        why = str(error) or "there is none"
        raise PlanError(f"JAX_PLATFORMS={asked}: {why}; set it to cpu to train on the cores") from None
    if backend != "cpu" or asked.split(",")[0] == "cpu":
        return
    for accelerator in accelerators():
        if accelerator.kind == "GPU" and hides_gpus(os.environ):
            continue
        platform, package = ("cuda", "jax[cuda13]") if accelerator.kind == "GPU" else ("tpu", "jax[tpu]")
        try:
            jax.devices(platform)
        except RuntimeError as error:
            raise PlanError(
                f"{accelerator}, and JAX cannot use it: {error}; pip install '{package}=={jax.__version__}', or what that says "
                "is missing, or set JAX_PLATFORMS=cpu to train on the cores"
            ) from None


def default_devices() -> tuple[DeviceKind, int]:
    """The kind of device that a run in this process computes on, and how many are here. Raises PlanError as `start` does."""
    check_accelerators()
    return cast(DeviceKind, jax.default_backend()), jax.local_device_count()


def describe_devices(plan: Plan) -> Devices:
    """What a run with this plan computes on."""
    device = jax.local_devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    memory = None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")
    count, processes = jax.device_count(), jax.process_count()
    return Devices("jax", device.device_kind, plan.devices, count, processes, packages, memory)


def is_leader() -> bool:
    """Whether this process has the console and writes files. Makes no device, and waits for no other process."""
    return _cluster().process == 0


def processes() -> Processes:
    """The processes of the run, after `set_up`."""
    count = jax.process_count()
    return Processes(jax.process_index(), count, _exchange) if count > 1 else Processes()


def _exchange(text: str) -> list[str]:
    """The texts of all processes, in their order; every process has to call."""
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int64(mine.size)))
    if not sizes.any():
        return [""] * len(sizes)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: mine.size] = mine
    texts = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(texts, sizes, strict=True)]


def _cluster() -> _Cluster:
    """The processes of this run, whatever its plan. Raises PlanError if the environment describes them wrongly."""
    if jax.distributed.is_initialized():
        return _Cluster(*_jax.joined_cluster())
    named = [name for name in (_COORDINATOR, _PROCESSES, _PROCESS) if name in os.environ]
    if not named:
        return _detected_cluster()
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


def _detected_cluster() -> _Cluster:
    """The cluster that JAX detects by itself, or this process alone. Raises PlanError if JAX cannot read it."""
    try:
        address, processes, index = _jax.detect_cluster(int(_PATIENCE_SECONDS))
    except (RuntimeError, ValueError, OSError) as error:
        raise PlanError(
            f"JAX sees a cluster and cannot read it ({error}); set {_COORDINATOR}, {_PROCESSES} and {_PROCESS} "
            f"({_PROCESSES}=1 for a process that is alone)"
        ) from None
    if address is None or processes is None or index is None:
        return _ALONE
    return _Cluster(address, processes, index)


def _join(cluster: _Cluster) -> None:
    """Join the other processes, if there are any. Raises PlanError if it cannot."""
    if cluster.processes == 1 or jax.distributed.is_initialized():
        return
    if cluster.process > 0:
        _await_coordinator(cluster)
    # It would take SIGTERM for itself, and end nothing: a run hears that signal itself (`trainspec.runs.stops`).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *cluster,
            initialization_timeout=int(_PATIENCE_SECONDS),
            heartbeat_timeout_seconds=int(_HEARTBEAT_SECONDS),
        )
    except (RuntimeError, OSError) as error:
        raise PlanError(
            f"process {cluster.process} of {cluster.processes} cannot join the one at {cluster.address}: {error}"
        ) from None


def _await_coordinator(cluster: _Cluster) -> None:
    """Wait until process 0 listens: XLA would abort if it does not. Raises PlanError when patience ends."""
    host, _, port = cluster.address.rpartition(":")
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise PlanError(
                    f"process {cluster.process} of {cluster.processes}: nobody answers at {cluster.address} "
                    f"({error.strerror or error}); start process 0 there, or correct {_COORDINATOR}"
                ) from None
        time.sleep(0.5)


def _make_cpu_devices(devices: int, *, processes: int) -> None:
    """Set how many CPU devices this process makes; no effect on a TPU or GPU."""
    local = devices // processes
    made: int = _jax.setting("jax_num_cpu_devices")
    if max(local, made) > 1:
        _reserve_threads(_THREADS_PER_CPU_DEVICE * max(local, made))
    if local <= max(made, 1):
        return
    if _jax.has_devices():
        # An earlier run of this process made fewer.
        if jax.default_backend() != "cpu" or processes > 1 or jax.device_count() >= devices:
            return
        _jax.drop_devices()
    jax.config.update("jax_num_cpu_devices", local)


def _reserve_threads(threads: int) -> None:
    """Let XLA's pool have at least that many threads: it reads NPROC, and has no setting."""
    os.environ["NPROC"] = str(max(threads, int(os.environ.get("NPROC") or os.cpu_count() or 1)))
