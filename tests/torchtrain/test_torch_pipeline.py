"""A pipeline gives the run of one process, whatever its stages, microbatches and the other axes of the plan.

What `make test` runs of it is in test_sharded.py, whose launch is there anyway.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import probe_pipeline
import pytest
from plan_cases import (
    PIPES,
    PIPES_EVALUATED,
    PIPES_MORE,
    PIPES_RESUMED,
    PIPES_RESUMED_MORE,
    PIPES_VIRTUAL,
    Case,
    Resumed,
)
from plan_runs import (
    APART,
    Make,
    check,
    check_evaluated,
    check_resumed,
    check_saved,
    recipe_of,
    run_cases,
    traces,
)
from ranks import furthest, run, run_all, traced

from parity.runs.edit import Edit
from torchtrain import cluster
from torchtrain.engines.pipeline import timeline
from torchtrain.step import init_state, logits
from trainspec.backends import BACKENDS
from trainspec.data import open_dataset
from trainspec.files.hf import resolve_model
from trainspec.plans.capabilities import expected_bubble
from trainspec.plans.pipeline import bubble
from trainspec.plans.plan import Plan
from trainspec.recipe import Recipe
from trainspec.runs.run import resolve

PROBED = PIPES[0]
# A mistake each, and the phase in which the comparison must see it.
PLANTED = {
    "divided by the number of microbatches": (
        PIPES[0],
        Edit(
            "torchtrain._deepspeed:Pipeline.backward_pass",
            "__class.backward(__engine, __loss, scale_wrt_gas=False)",
            "__class.backward(__engine, __loss)",
        ),
        "gradient",
    ),
    "gradient of one use of a tied embedding": (
        PIPES[2],
        Edit("torchtrain.engines.pipeline:_layers", "__config.tie_word_embeddings and __is_trained", "False"),
        "gradient",
    ),
    "what the first microbatch may see": (
        PIPES[0],
        Edit(
            "torchtrain.engines.pipeline:PipelineEngine._forward_pass",
            '__inputs["visible"]',
            'self._layer_arguments.get("visible", __it)',
        ),
        "activation",
    ),
    "recomputed with the dropout of a later microbatch": (
        PIPES[1],
        Edit("torchtrain.engines.pipeline:PipelineEngine._backward_pass", "__microbatches.backward(__index)", "None"),
        "gradient",
    ),
    "clipped by the norm of a stage": (
        PIPES[0],
        Edit(
            "torchtrain._deepspeed:Pipeline.__init__",
            "__engine._compute_loss = __yes",
            "__it\n__engine.optimizer.model_parallel_group = None",
        ),
        "moment1",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def few(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("few")
    return run_cases(make, home, [*PIPES, *PIPES_VIRTUAL], PIPES_RESUMED, PIPES_EVALUATED)


@pytest.fixture(scope="module")
def more(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("more")
    return run_cases(make, home, PIPES_MORE, PIPES_RESUMED_MORE, [])


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("case", [*PIPES, *PIPES_VIRTUAL], ids=str)
def test_a_pipeline_is_the_run_of_one_process(few: Path, case: Case):
    check(*traces(few, case), case.precision)


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("case", PIPES_MORE, ids=str)
def test_every_pipeline_is_the_run_of_one_process(more: Path, case: Case):
    check(*traces(more, case), case.precision)


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("case", [*PIPES, *PIPES_VIRTUAL], ids=str)
def test_every_stage_saves_its_layers(few: Path, case: Case):
    check_saved(few, case)


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("resumed", PIPES_RESUMED, ids=str)
def test_a_pipeline_goes_on_under_another_plan(few: Path, resumed: Resumed):
    check_resumed(few, resumed, few / str(resumed))


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("resumed", PIPES_RESUMED_MORE, ids=str)
def test_larger_pipelines_go_on_under_another_plan(more: Path, resumed: Resumed):
    check_resumed(more, resumed, more / str(resumed))


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("case", PIPES_EVALUATED, ids=str)
def test_heldout_loss_of_a_pipeline_is_that_of_one_process(few: Path, case: Case):
    check_evaluated(few, case)


@pytest.mark.parametrize(("stages", "microbatches"), [*itertools.product((2, 4, 8), (4, 8, 16, 32))])
def test_the_schedule_leaves_the_bubble_of_the_formula(stages: int, microbatches: int):
    plan = Plan(pipe=stages)
    slots = timeline(plan, microbatches)
    assert bubble(slots) == expected_bubble(plan, microbatches, BACKENDS["torch"])
    assert bubble(slots) != expected_bubble(Plan(pipe=stages + 1), microbatches, BACKENDS["torch"])  # control
    for stage in slots:
        for kind in ("forward", "backward"):
            assert [work.microbatch for work in stage if work and work.kind == kind] == [*range(microbatches)]


@pytest.fixture(scope="module")
def probed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, list[dict[str, Any]]]:
    home = tmp_path_factory.mktemp("probe")
    recipe = recipe_of(make, PROBED)
    file = home / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    run(Path(probe_pipeline.__file__), [str(file)], home, processes=2)
    return recipe, home, json.loads((home / "results.json").read_text())


@pytest.mark.full(minutes=3)
def test_logits_of_examples_that_microbatches_do_not_divide(probed, make: Make):
    _, home, _ = probed
    recipe = recipe_of(make, PROBED.alone)
    cluster.start(recipe)
    try:
        state = init_state(resolve(recipe))
        whole = logits(state, open_dataset(resolve(recipe), "train").batch(0, probe_pipeline.ODD_EXAMPLES))
    finally:
        cluster.finish()
    np.testing.assert_array_equal(
        np.fromfile(home / "results.logits", np.float32).reshape(whole.shape), whole
    )


@pytest.mark.full(minutes=3)
def test_between_stages_hidden_states_travel_and_nothing_else(probed):
    recipe, _, (result, _) = probed
    microbatches = recipe.batch.accumulation * recipe.plan.microbatches
    examples = recipe.batch.global_examples // microbatches
    size = examples * recipe.data.sequence_tokens * resolve_model(recipe.model)[0].embed * 4
    sent = [c for c in result["moved"] if c["kind"] == "collective-permute" and c["dtype"] == "f32"]
    assert [(c["payload_bytes"], c["times"]) for c in sent] == [(size, microbatches)]


@pytest.mark.full(minutes=3)
def test_a_loss_that_is_no_number_leaves_every_stage_as_it_was(probed):
    assert all(result["refused"] for result in probed[2])


@pytest.mark.full(minutes=3)
def test_a_run_leaves_no_groups_behind(probed):
    first, second = (result["groups"] for result in probed[2])
    assert first == second


@pytest.fixture(scope="module")
def planted(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("planted")
    commands = [traced(recipe_of(make, case), home / name, edit) for name, (case, edit, _) in PLANTED.items()]
    run_all(commands, home / "launch", processes=2)
    return home


@pytest.mark.full(minutes=3)
@pytest.mark.parametrize("fault", PLANTED)
def test_a_mistake_is_seen(few: Path, planted: Path, fault: str):
    """Negative control: the same comparisons, with one line of the product changed."""
    case, _, group = PLANTED[fault]
    left, right = traces(few, case)[0], planted / fault / "trace"
    assert furthest(left, right, group, step=1) > 1e-2
    with pytest.raises(AssertionError, match=APART):
        check(left, right, case.precision)
