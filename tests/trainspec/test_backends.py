"""What the backends declare: who they are, and the words in which each refuses a plan."""

from typing import get_args

import pytest

from trainspec.backends import BACKENDS
from trainspec.errors import PlanError
from trainspec.plans.capabilities import Limit, check_supported
from trainspec.plans.cost import Cost
from trainspec.plans.plan import Backend, Plan

NO_FLOAT64 = "DeepSpeed has no float64"


def test_every_file_declares_a_backend_of_its_name():
    assert list(BACKENDS) == list(get_args(Backend))
    for name, backend in BACKENDS.items():
        assert backend.name == name
        assert not getattr(backend.cost, "__abstractmethods__", None)
        assert issubclass(backend.cost, Cost)


@pytest.mark.parametrize(
    ("plan", "policy", "said"),
    [
        (Plan(pipe=2), "fp64",
         f"plan.pipe=2 with precision.policy=fp64: {NO_FLOAT64}; use precision.policy=fp32 "
         "(parity check: --precision fp32), plan.pipe=1 plan.microbatches=1, or the jax backend"),
        (Plan(pipe=2, schedule="interleaved"), "fp32",
         "plan.schedule=interleaved: DeepSpeed's pipeline runs 1f1b; use plan.schedule=1f1b, or the jax backend"),
        (Plan(pipe=3, fsdp=2, shards="params"), "fp32",
         "plan.shards=params with plan.pipe=3: DeepSpeed's pipeline has no ZeRO stage above 1; "
         "use plan.shards=optimizer, or plan.pipe=1 plan.microbatches=1 plan.fsdp=6"),
        (Plan(pipe=2, data=2, fsdp=2), "bf16",
         "plan.shards=nothing with plan.pipe=2: DeepSpeed's stage 0 leaves the later stages out of the norm "
         "that it clips by; use plan.fsdp=4 plan.data=1 plan.shards=optimizer"),
        (Plan(fsdp=2, shards="optimizer"), "fp64",
         f"plan.shards=optimizer with precision.policy=fp64: {NO_FLOAT64}; use plan.shards=nothing, "
         "precision.policy=fp32, or the jax backend"),
        (Plan(data=3), "bf16",
         "plan.shards=nothing with precision.policy=bf16: DeepSpeed's stage 0 makes a hidden first update; "
         "use plan.fsdp=3 plan.data=1 plan.shards=optimizer"),
    ],
)  # fmt: skip
def test_torch_refuses_in_these_words(plan: Plan, policy, said: str):
    with pytest.raises(PlanError) as caught:
        check_supported(plan, policy, BACKENDS["torch"])
    assert str(caught.value) == said
    check_supported(plan, policy, BACKENDS["jax"])


def test_a_limit_is_met_only_where_all_that_it_names_is():
    limit = Limit(
        pipelined=True, replicated=False, precisions=("fp32",), shards=("nothing",), refusal="{policy}"
    )
    assert limit.applies_to(Plan(pipe=2), "fp32")
    assert limit.refuse(Plan(pipe=2), "fp32") == "fp32"
    others = [(Plan(), "fp32"), (Plan(pipe=2, data=2), "fp32"), (Plan(pipe=2), "bf16")]
    assert not any(limit.applies_to(plan, policy) for plan, policy in others)
    assert Limit(refusal="").applies_to(Plan(), "fp64")
