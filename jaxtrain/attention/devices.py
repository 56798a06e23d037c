"""A kernel that the compiler cannot split: every device runs it for its own examples and heads."""

from __future__ import annotations

import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.attention.visible import Visible
from jaxtrain.layers import Attend
from trainspec.plans.plan import ACTIVATION_AXES


def on_each_device(attend: Attend, mesh: Mesh) -> Attend:
    """`attend` under `shard_map`: batch and heads are split as the plan's activations are, and a row is whole.

    Under the `vmap` of a pipeline's stages (`spmd_axis_name`) each device has its own stage's.
    """
    rows, heads = ACTIVATION_AXES["batch"], ACTIVATION_AXES["heads"]
    of_heads, of_rows = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)

    def attend_on_each(q_BSHD: Array, k_BTKD: Array, v_BTKD: Array, visible: Visible) -> Array:
        specs = (of_heads, of_heads, of_heads, jax.tree.map(lambda _: of_rows, visible))
        mapped = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=of_heads, check_vma=False)
        return mapped(q_BSHD, k_BTKD, v_BTKD, visible)

    return attend_on_each
