"""JAX's private and version-dependent names, each wrapped in a function with a plain name.

No other module of jaxtrain uses a private name of JAX: to upgrade, hold this file to the new version.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
from jax import Array
from jax._src import distributed, xla_bridge
from jax._src.clusters import ClusterEnv
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.extend.backend import clear_backends

from trainspec.versions import report_other_version

# The version that this file was read against, and all tests were run with; pyproject.toml pins it.
WRITTEN_FOR = "0.10.2"


@cache
def report_version() -> None:
    """Say on stderr, once, if the installed JAX is not the version that this file was written for."""
    report_other_version("jax", jax.__version__, written_for=WRITTEN_FOR, program="jaxtrain")


def setting(name: str) -> Any:
    """The value of one of JAX's settings: `jax.config` documents how to set them, and not how to read them."""
    return getattr(jax.config, name)


def joined_cluster() -> tuple[str, int, int]:
    """Address of the coordinator, number of processes, and index of this one, after `jax.distributed.initialize`."""
    joined = distributed.global_state
    return joined.coordinator_address or "", joined.num_processes, joined.process_id


def detect_cluster(timeout_seconds: int) -> tuple[str | None, int | None, int | None]:
    """Address of the coordinator, number of processes, and index of this one, as JAX reads them from its environment.

    JAX knows TPU pods, Slurm, Open MPI and Kubernetes; its public function would join at once. All are None in no cluster.
    Raises RuntimeError, ValueError or OSError if it sees a cluster and cannot read it.
    """
    address, processes, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, timeout_seconds
    )
    return address, processes, index


def wait_at_barrier(name: str, timeout_seconds: float) -> None:
    """Wait until all processes are here. Raises jax.errors.JaxRuntimeError if they are not in time."""
    client = distributed.global_state.client
    assert client is not None
    client.wait_at_barrier(name, int(1000 * timeout_seconds))


def has_devices() -> bool:
    """Whether this process has made its devices: settings of their number have no effect any more."""
    return xla_bridge.backends_are_initialized()


def drop_devices() -> None:
    """Let this process make its devices anew."""
    clear_backends()


def use_compilation_cache(enabled: bool) -> None:
    """Switch the persistent compilation cache. JAX reads that setting once, unless its cache is reset."""
    jax.config.update("jax_enable_compilation_cache", enabled)
    reset_cache()


def splash_gradients(
    kernel: splash.SplashAttentionKernel,
    q_HLD: Array,
    k_KLD: Array,
    v_KLD: Array,
    segments: splash.SegmentIds,
    mixed_HLD: Array,
    log_sum_HL: Array,
    d_mixed_HLD: Array,
) -> tuple[Array, Array, Array]:
    """The gradients of queries, keys and values of a row where they are a part of attention, the result of which is `mixed`.

    `log_sum` is that of all its scores. The kernel's own differentiation would take both from this part alone.
    """
    masks = (kernel.dq_mask_info, kernel.dkv_mask_info)
    kept = (q_HLD, k_KLD, v_KLD, segments, None, mixed_HLD, log_sum_HL, *masks)
    _, _, _, dq, dk, dv, *_ = splash._splash_attention_bwd(**kernel.kwargs, res=kept, do=d_mixed_HLD)
    return dq, dk, dv
