"""Operations on a device's own shard that should involve all shards."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.optim import Moments, global_norm
from jaxtrain.weights import Arrays


def norm_of_own_shards(gradients: Arrays, placed: Mapping[str, NamedSharding]) -> Array:
    """Each device's own norm, though it is said to be that of all of them."""
    mesh = next(iter(placed.values())).mesh
    specs = ({name: placed[name].spec for name in gradients},)
    return jax.shard_map(global_norm, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(
        gradients
    )


def with_a_stale_shard(old: Moments, new: Moments, placed: Mapping[str, NamedSharding]) -> Moments:
    """`new`, but the second half of every dimension that fsdp splits keeps its values of `old`."""
    return Moments(
        *(
            {n: _stale(before[n], after[n], placed[n]) for n in after}
            for before, after in zip(old, new, strict=True)
        )
    )


def _stale(old: Array, new: Array, sharding: NamedSharding) -> Array:
    dim = next((d for d, axes in enumerate(sharding.spec) if axes and "fsdp" in axes), None)
    if dim is None:
        return new
    late = lax.broadcasted_iota(int, new.shape, dim) >= new.shape[dim] // 2
    return jnp.where(late, old, new)
