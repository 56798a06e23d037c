from pathlib import Path

import pytest
from small import ROOT

from trainspec.errors import RecipeError
from trainspec.recipe import Recipe, load_recipe

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
assert SHIPPED
MINIMAL = "model: {from: preset:tiny, weights: random}\ndata: {train: x.jsonl}\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_and_overrides(recipe_file: Path):
    recipe = load_recipe(recipe_file, ["optimizer.lr=2e-3", "method.targets=[q_proj, k_proj]", "run.steps=7"])
    assert (recipe.optimizer.lr, recipe.run.steps) == (2e-3, 7)
    assert recipe.method.kind == "lora"
    assert recipe.method.targets == ("q_proj", "k_proj")


def test_another_kind_drops_the_fields_of_the_old_one(recipe_file: Path):
    recipe_file.write_text(MINIMAL + "method: {kind: lora, rank: 4}\n")
    assert load_recipe(recipe_file, ["method.kind=full"]).method.kind == "full"


def test_another_kind_of_schedule_keeps_its_warm_up(recipe_file: Path):
    recipe_file.write_text(MINIMAL + "schedule: {kind: cosine, warmup_steps: 5}\n")
    assert load_recipe(recipe_file, ["schedule.kind=linear"]).schedule.warmup_steps == 5


def test_fp64_reduces_in_fp64_unless_told_otherwise(recipe_file: Path):
    assert load_recipe(recipe_file, ["precision.policy=fp64"]).precision.reduce == "fp64"


def test_resolved_recipe_reads_back_equal(recipe_file: Path, tmp_path: Path):
    recipe = load_recipe(recipe_file, ["method.rank=3"])
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_recipe_is_frozen(recipe_file: Path):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(recipe_file).run.steps = 3  # type: ignore[misc]


def test_schema_names_every_section():
    assert set(Recipe.model_json_schema(by_alias=True)["properties"]) == set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key"),
        ("optimizer.lrr=1", "did you mean 'lr'"),
        ("optimiser.lr=1", "did you mean 'optimizer'"),
        ("method.rnk=1", "did you mean 'rank'"),
        ("run.steps=many", "run.steps"),
        ("run.steps=1.5", "run.steps"),
        ("batch.accumulation=3", "does not divide"),
        ("method.kind=lara", "unknown kind 'lara'; choose one of"),
        ("precision.policy=fp16", "precision.policy"),
        ("precision.reduce=bf16", "does not go with"),
        ("run", "write KEY=VALUE"),
        ("run.steps.x=1", "is a value, not a section"),
        ("run.steps=[", "not a YAML value"),
    ],
)
def test_bad_overrides_get_one_clear_line(recipe_file: Path, override: str, message: str):
    base = ["run.steps=5"] if override.startswith("run.steps.") else []
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, [*base, override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "model: [", "model: {from: x}\n", MINIMAL + "run: {steps: 3, steps: 4}\n"]
)
def test_bad_files_get_one_clear_line(tmp_path: Path, text: str):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"configs/demo\.yaml"):
        load_recipe(tmp_path / "no.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_shipped_recipes_load(path: Path):
    load_recipe(path)
