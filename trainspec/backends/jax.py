"""JAX with its compiler, which splits arrays as the plan says: every plan of every precision runs."""

from __future__ import annotations

from collections.abc import Sequence

from trainspec.params import Param
from trainspec.plans.capabilities import Capabilities
from trainspec.plans.cost import Cost, width
from trainspec.plans.pipeline import stack_order
from trainspec.plans.plan import COMPUTE_DTYPE, StateKind, local_size


class JaxCost(Cost):
    """It splits over fsdp and repeats over data; the sum of gradients over slices has the type of `reduce`.

    With `shards: optimizer` it keeps whole gradients and has to gather weights as well: 3Ψ.
    """

    @property
    def ranks(self) -> int:
        """Those of fsdp."""
        return self.plan.fsdp

    @property
    def has_master(self) -> bool:
        """In bf16."""
        return self.policy == "bf16"

    @property
    def extra_gradient_bytes(self) -> int:
        """The sum is all there is."""
        return 0

    @property
    def scatters_sums(self) -> bool:
        """Only where the plan says so."""
        return False

    @property
    def reduces_every_slice(self) -> bool:
        """The sum over slices is one of reduced gradients."""
        return True

    def elements(self, entries: Sequence[Param], part: StateKind, stage: int) -> float:
        """Embedding, norm and head are on every stage, and a stage of fewer layers is filled up."""
        share = len(stack_order(self.plan, self.model.layers)) / self.model.layers / self.plan.pipe
        return sum(
            local_size(p, self.plan, over_fsdp=self.plan.splits(part)) * (1 if p.layer is None else share)
            for p in entries
        )

    def gradient_bytes(self, param: Param, scattered: bool) -> float:
        """Sums over tokens that are no matrix product are float32 or wider, and are whole before they are rounded."""
        is_widened = param.role == "embedding" or len(param.shape) == 1
        if is_widened and width(COMPUTE_DTYPE[self.reduce]) < width("float32"):
            size = local_size(param, self.plan, over_fsdp=False)
            return width("float32") * size * self.reductions(scattered=False)
        return super().gradient_bytes(param, scattered)

    def reductions(self, scattered: bool) -> float:
        """Over data and fsdp at once the compiler makes one sum for all of them, and cuts it."""
        return super().reductions(scattered and self.plan.data == 1)

    def gathers(self, param: Param) -> int:
        """For the forward and for the backward pass; a lookup's does not need its table."""
        is_tied = all(p.role != "head" for p in (*self.trained, *self.frozen))
        return 1 if param.role == "embedding" and not is_tied else 2


BACKEND = Capabilities(
    name="jax",
    program="jaxtrain",
    limits=(),
    # A mesh axis has to divide the dimension.
    pads_shards=False,
    idle_first_stage=None,
    lockstep_schedules=("1f1b",),
    has_process_per_device=False,
    cost=JaxCost,
)
