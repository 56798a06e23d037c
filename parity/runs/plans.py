"""Which plan each backend runs where one of them refuses a plan: on one device its arithmetic is the same."""

from __future__ import annotations

from trainspec.backends import BACKENDS
from trainspec.plans.capabilities import check_supported
from trainspec.errors import PlanError
from trainspec.plans.plan import Backend, Plan, Policy


def refusal(plan: Plan, policy: Policy, backend: Backend) -> str | None:
    """The line with which a backend refuses a plan; None where it runs it."""
    try:
        check_supported(plan, policy, BACKENDS[backend])
    except PlanError as error:
        return str(error)
    return None


def runs_as(plan: Plan, policy: Policy, backend: Backend) -> Plan:
    """The plan, or one device where the backend refuses it: the other one's run of the plan is compared with that."""
    return Plan(remat=plan.remat) if refusal(plan, policy, backend) else plan
