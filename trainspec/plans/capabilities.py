"""What a backend can do, as data that it declares, and the checks that refuse a plan, in one line, by that data.

The declarations are in `trainspec/backends/`, one file each. No check asks for a backend's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from trainspec.errors import PlanError, RecipeError
from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.plans.cost import Cost
from trainspec.plans.names import DeviceKind
from trainspec.plans.pipeline import stages_of
from trainspec.plans.plan import Backend, Plan, Policy


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Plans that a backend does not run: those that match every condition. None or empty matches everything.

    `refusal` is the message for the user, with the nearest plan that works. It may use `{plan.KEY}`, `{policy}`, and
    `{fsdp_of_all}`, the plan's `fsdp` times its `pipe`.
    """

    refusal: str
    pipelined: bool | None = None
    replicated: bool | None = None
    precisions: tuple[Policy, ...] = ()
    schedules: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()

    def applies_to(self, plan: Plan, policy: Policy) -> bool:
        """Whether this plan and precision match."""
        return (
            self.pipelined in (None, plan.pipe > 1)
            and self.replicated in (None, plan.replicas > 1)
            and policy in (self.precisions or (policy,))
            and plan.schedule in (self.schedules or (plan.schedule,))
            and plan.shards in (self.shards or (plan.shards,))
        )

    def refuse(self, plan: Plan, policy: Policy) -> str:
        """The message for this plan."""
        return self.refusal.format(plan=plan, policy=policy, fsdp_of_all=plan.fsdp * plan.pipe)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """One backend.

    - `name`: as in `parity --left NAME` and in messages; `program` is its command and its package.
    - `limits`: plans and precisions that it does not run; the first that applies is reported.
    - `pads_shards`: whether a size that `fsdp` does not divide is padded instead of refused.
    - `idle_first_stage`: the refusal, with `{plan.KEY}`, of a pipeline whose stage 0 trains nothing; None: it runs.
    - `lockstep_schedules`: schedules under which every tick has room for a forward and a backward pass on all stages.
    - `has_process_per_device`: whether a launcher starts one process per device, or one process has them all.
    - `cost`: the arithmetic of memory and traffic.
    - `runs_on`: the kinds of devices.
    - `no_native_format`: the refusal of `checkpoint.format: native`; None: there is one.
    """

    name: Backend
    program: str
    limits: tuple[Limit, ...]
    pads_shards: bool
    idle_first_stage: str | None
    lockstep_schedules: tuple[str, ...]
    has_process_per_device: bool
    cost: type[Cost]
    runs_on: tuple[DeviceKind, ...]
    no_native_format: str | None


def check_supported(plan: Plan, policy: Policy, backend: Capabilities) -> None:
    """The support matrix. Raises PlanError for what a backend cannot run, with the nearest plan that works."""
    if plan.pipe == 1 and plan.microbatches > 1:
        raise PlanError(
            f"plan.microbatches={plan.microbatches}: there is no pipeline with plan.pipe=1; "
            "use plan.pipe=2 or more, or plan.microbatches=1"
        )
    if plan.shards != "nothing" and plan.fsdp == 1:
        way_out = f"use plan.fsdp={plan.data} plan.data=1" if plan.data > 1 else "use plan.shards=nothing"
        raise PlanError(f"plan.shards={plan.shards}: nothing to split over with plan.fsdp=1; {way_out}")
    for limit in backend.limits:
        if limit.applies_to(plan, policy):
            raise PlanError(limit.refuse(plan, policy))


def check_format(name: str, backend: Capabilities) -> None:
    """Raises RecipeError for a format of checkpoints that a backend does not have."""
    if name == "native" and backend.no_native_format:
        raise RecipeError(backend.no_native_format)


def check_fits(
    plan: Plan, model: ModelSpec, *, global_examples: int, accumulation: int, backend: Capabilities
) -> None:
    """Raises PlanError where the plan does not divide the model or the batch, with sizes that would."""
    for name in ("heads", "kv_heads", "mlp", "vocab"):
        size = getattr(model, name)
        if size % plan.tensor:
            raise PlanError(
                f"plan.tensor={plan.tensor} cannot split {name}={size} of {model.name}; {_choose('tensor', model)}"
            )
    if not backend.pads_shards and plan.shards != "nothing" and model.embed % plan.fsdp:
        raise PlanError(
            f"plan.fsdp={plan.fsdp} cannot split embed={model.embed} of {model.name}; "
            f"use a divisor of {model.embed}, or plan.data"
        )
    _check_stages(plan, model)
    parts = accumulation * plan.microbatches * plan.replicas
    if global_examples % parts:
        microbatches = f" × plan.microbatches={plan.microbatches}" if plan.microbatches > 1 else ""
        raise PlanError(
            f"batch.global_examples={global_examples} cannot be split into {parts} equal parts "
            f"(batch.accumulation={accumulation}{microbatches} × plan.data={plan.data} × plan.fsdp={plan.fsdp}); "
            f"use batch.global_examples={parts * -(-global_examples // parts)}"
            f"{', or fewer plan.microbatches' if microbatches else ''}"
        )


def check_trains(plan: Plan, model: ModelSpec, trained: Iterable[Param], backend: Capabilities) -> None:
    """Raises PlanError for a pipeline whose first stage trains nothing, where the backend cannot run one."""
    if backend.idle_first_stage and all(0 not in stages_of(param, plan, model) for param in trained):
        raise PlanError(backend.idle_first_stage.format(plan=plan))


def expected_bubble(plan: Plan, microbatches: int, backend: Capabilities) -> Fraction:
    """The `bubble` that a backend's schedule should have.

    (S - 1) / (V M + S - 1) for S stages with V model chunks each and M microbatches; in lockstep 2 (S - 1) / (M + 2 (S - 1)).
    """
    idle = plan.pipe - 1
    if plan.schedule in backend.lockstep_schedules:
        return Fraction(2 * idle, microbatches + 2 * idle)
    return Fraction(idle, plan.chunks_per_stage * microbatches + idle)


def _check_stages(plan: Plan, model: ModelSpec) -> None:
    chunks, layers = plan.pipe * plan.chunks_per_stage, model.layers
    if chunks > layers:
        fewer = layers // plan.pipe
        if plan.chunks_per_stage == 1:
            way_out = f"plan.pipe can be at most {layers}"
        elif fewer == 0:
            way_out = f"plan.pipe × plan.chunks can be at most {layers}"
        else:
            way_out = f"use plan.chunks={fewer}" if fewer > 1 else "use plan.schedule=1f1b"
        held = f" × plan.chunks={plan.chunks}" if plan.chunks_per_stage > 1 else ""
        raise PlanError(
            f"plan.pipe={plan.pipe}{held} cuts {model.name}, which has {layers} layers, into {chunks} model chunks; {way_out}"
        )
    # A stage takes up its next chunk as soon as the last stage is done with a group of microbatches.
    if plan.chunks_per_stage > 1 and plan.microbatches % plan.pipe:
        fits = plan.pipe * -(-plan.microbatches // plan.pipe)
        raise PlanError(
            f"plan.schedule=interleaved takes microbatches in groups of plan.pipe={plan.pipe}, not "
            f"{plan.microbatches}; use plan.microbatches={fits}"
        )


def _choose(axis: str, model: ModelSpec) -> str:
    sizes = (model.heads, model.kv_heads, model.mlp, model.vocab)
    fits = [n for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes)]
    return f"plan.{axis} can be {', '.join(map(str, fits))}"
