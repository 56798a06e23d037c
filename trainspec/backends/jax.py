"""JAX, whose compiler shards arrays as the plan says: it runs every plan in every precision."""

from __future__ import annotations

from collections.abc import Sequence

from trainspec.params import Param
from trainspec.plans.capabilities import Capabilities
from trainspec.plans.cost import Cost, width
from trainspec.plans.pipeline import stack_order
from trainspec.plans.plan import COMPUTE_DTYPE, StateKind, local_size


class JaxCost(Cost):
    """JAX shards over fsdp and replicates over data; gradients are summed over slices in the type of `reduce`.

    With `shards: optimizer` gradients stay whole and weights have to be gathered as well: 3Ψ.
    """

    @property
    def ranks(self) -> int:
        """The devices of fsdp."""
        return self.plan.fsdp

    @property
    def has_master(self) -> bool:
        """In bf16."""
        return self.policy == "bf16"

    @property
    def extra_gradient_bytes(self) -> int:
        """None."""
        return 0

    @property
    def scatters_sums(self) -> bool:
        """Never."""
        return False

    @property
    def reduces_every_slice(self) -> bool:
        """The sum over slices adds reduced gradients."""
        return True

    def elements(self, entries: Sequence[Param], kind: StateKind, stage: int) -> float:
        """Embedding, norm and head are on every stage; a stage with fewer layers is padded."""
        share = len(stack_order(self.plan, self.model.layers)) / self.model.layers / self.plan.pipe
        return sum(
            local_size(p, self.plan, over_fsdp=self.plan.splits(kind)) * (1 if p.layer is None else share)
            for p in entries
        )

    def gradient_bytes(self, param: Param, scattered: bool) -> float:
        """Sums over tokens other than matrix products are float32 or wider, and are reduced whole before they are rounded."""
        is_widened = param.role == "embedding" or len(param.shape) == 1
        if is_widened and width(COMPUTE_DTYPE[self.reduce]) < width("float32"):
            size = local_size(param, self.plan, over_fsdp=False)
            return width("float32") * size * self.reductions(scattered=False)
        return super().gradient_bytes(param, scattered)

    def reductions(self, scattered: bool) -> float:
        """Over data and fsdp together the compiler makes one all-reduce, of which each device keeps its slice."""
        return super().reductions(scattered and self.plan.data == 1)

    def gathers(self, param: Param) -> int:
        """Twice, for the forward and the backward pass; the backward pass of a lookup does not need the table."""
        is_tied = all(p.role != "head" for p in (*self.trained, *self.frozen))
        return 1 if param.role == "embedding" and not is_tied else 2


BACKEND = Capabilities(
    name="jax",
    program="jaxtrain",
    limits=(),
    # A mesh axis must divide the dimension.
    pads_shards=False,
    idle_first_stage=None,
    lockstep_schedules=("1f1b",),
    has_process_per_device=False,
    cost=JaxCost,
    runs_on=("cpu", "gpu", "tpu"),
    no_native_format=None,
)
