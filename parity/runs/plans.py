"""The plan that each backend runs if one of them refuses a plan: one device, where the arithmetic is the same."""

from __future__ import annotations

from trainspec.backends import BACKENDS
from trainspec.errors import PlanError
from trainspec.plans.capabilities import check_supported
from trainspec.plans.plan import Backend, Plan, Policy


def refusal(plan: Plan, policy: Policy, backend: Backend) -> str | None:
    """The sentence with which a backend refuses a plan; None if it runs the plan."""
    try:
        check_supported(plan, policy, BACKENDS[backend])
    except PlanError as error:
        return str(error)
    return None


def runs_as(plan: Plan, policy: Policy, backend: Backend) -> Plan:
    """The plan, or one device if the backend refuses it; the other backend's run of the plan is compared with that."""
    if refusal(plan, policy, backend) is None:
        return plan
    return Plan(remat=plan.remat, attention=plan.attention, loss_chunk=plan.loss_chunk)
