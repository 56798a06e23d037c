"""Attention, one kernel a file: what is computed is the same, and `reference` defines it.

A kernel is given queries, keys, values and what a query may see (`visible.Visible`). Only `reference` makes all scores at once.
"""

from __future__ import annotations

from jax.sharding import Mesh

from jaxtrain.attention import blocks, cudnn, reference, splash
from jaxtrain.attention.kernel import AttentionSite, Kernel
from trainspec.plans.plan import Plan
from trainspec.runs.run import Run

REFERENCE = Kernel("reference", lambda _: None, lambda _: reference.attend)
# Those that keep no scores: the first that a site lacks nothing for is its own. The last one runs anywhere.
FUSED = (
    Kernel("splash", splash.lack, splash.make),
    Kernel("cudnn", cudnn.lack, cudnn.make),
    Kernel("blocks", lambda _: None, lambda _: blocks.attend),
)


def choose_kernel(plan: Plan, site: AttentionSite) -> Kernel:
    """The kernel that a plan asks for. In fp64, the proof, it has to ask for a fused one by name."""
    if plan.attention == "reference" or (plan.attention == "auto" and site.policy == "fp64"):
        return REFERENCE
    return next(kernel for kernel in FUSED if kernel.lack(site) is None)


def site_of(run: Run, mesh: Mesh) -> AttentionSite:
    """Where a run computes attention."""
    data = run.recipe.data
    has_causal_rows = not data.packing and data.padding_side == "right"
    return AttentionSite(mesh, run.recipe.precision.policy, run.spec.head_dim, has_causal_rows)
