import datetime
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import ROOT

from trainspec.errors import RecipeError
from trainspec.methods import METHODS
from trainspec.recipe import Recipe, idle_settings, load_recipe

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


def test_the_schema_describes_every_setting():
    schema = Recipe.model_json_schema(by_alias=True)
    sections = {"Recipe": schema, **schema["$defs"]}
    described = {
        f"{section}.{name}": bool(field.get("description"))
        for section, defined in sections.items()
        for name, field in defined["properties"].items()
    }
    assert {"Recipe.plan", "ModelSource.from", "Data.columns", "LoRA.rank", "PrefixTuning.adapter"} <= set(
        described
    )
    assert not [setting for setting, has_text in described.items() if not has_text]


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
        ("data.date=tomorrow", "data.date: 'tomorrow' is not a date; write one such as 2024-07-26"),
        ("data.date=2024-13-01", "data.date=2024-13-01: '2024-13-01' is not a YAML value: month must be in"),
        ("data.date='2024-13-01'", "data.date: '2024-13-01' is not a date"),
        (
            "data.date=2024-01-01 10:00:00",
            "data.date: must be a date such as 2024-07-26, not 2024-01-01 10:00:00",
        ),
        ("data.columns=question", "data.columns: must be a mapping such as {instruction: question}"),
        (
            "data.columns={instruction: 5}",
            "data.columns: maps a field's name to a field's name; 5 is not text",
        ),
        (
            "data.columns={1: x, output: y}",
            "data.columns: maps a field's name to a field's name; 1 is not text",
        ),
        ("data.ignore=id", "data.ignore: must be a list, not 'id'"),
        ("data.ignore=[id, 5]", "data.ignore: must be text, not 5 (element 2); write it in quotes"),
        ("data.train=''", "data.train"),
        ("method.targets=5", "method.targets: must be a list or text, not 5"),
        ("method.alpha=.inf", "method.alpha: must be a finite number, not inf"),
        ("optimizer.lr=.inf", "optimizer.lr: must be a finite number"),
        ("optimizer.lr=.nan", "optimizer.lr: must be a finite number"),
        ("optimizer.betas=[0.9]", "optimizer.betas: missing (element 2)"),
        ("optimizer.clip_norm=0", "for no clipping write optimizer.clip_norm=null"),
        ("plan.loss_chunk=0", "plan.loss_chunk: 0 is no number of positions; write auto, or 1 or more"),
        (
            "plan.loss_chunk=half",
            "plan.loss_chunk: 'half' is no number of positions; write auto, or 1 or more",
        ),
        ("optimizer.clip_norm=-1", "for no clipping write optimizer.clip_norm=null"),
        ("optimizer=", "optimizer: must be a mapping of settings, not null"),
        (
            "checkpoint.keep=99999999999999999999",
            "checkpoint.keep: a number of some 20 digits is larger than any",
        ),
        ("checkpoint.every_minutes=0", "checkpoint.every_minutes"),
        ("checkpoint.keep_best=-1", "checkpoint.keep_best"),
        ("checkpoint.keep_every_steps=0", "checkpoint.keep_every_steps"),
        ("checkpoint.format=orbax", "checkpoint.format"),
        ("checkpoint.on_failure=ignore", "checkpoint.on_failure"),
        (
            "checkpoint.keep_best=2",
            "checkpoint.keep_best=2: without data.heldout no held-out loss is measured; set data.heldout, or",
        ),
        ('data.train="\\ud800"', "data.train: '\\ud800' has a character that is not text"),
        ('data.train="a\\0b"', "data.train: 'a\\x00b' has a character that is not text"),
        ("run.epochs=0", "run.epochs"),
        (
            "run={steps: 5, epochs: 2}",
            "run.steps=5 and run.epochs=2: give one of them, and null for the other: --set run.epochs=null",
        ),
        (
            "schedule={warmup_steps: 5, warmup_ratio: 0.1}",
            "schedule.warmup_steps=5 and schedule.warmup_ratio=0.1",
        ),
        ("schedule.warmup_ratio=1", "schedule.warmup_ratio: input should be less than 1"),
    ],
)
def test_bad_overrides_get_one_clear_line(recipe_file: Path, override: str, message: str):
    base = ["run.steps=5"] if override.startswith("run.steps.") else []
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, [*base, override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "model: [",
        "model: {from: x}\n",
        MINIMAL + "run: {steps: 3, steps: 4}\n",
        MINIMAL + "run: {steps: !!int x}\n",
        MINIMAL + "run: !!map [1]\n",
        MINIMAL + "run: !!timestamp x\n",
        MINIMAL + "run: &a {steps: *a}\n",
        "model: " + "[" * 2000 + "]" * 2000,
        # Sixteen lists of lists of lists: what it stands for does not fit in memory.
        "a: &a [x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '*a'] * 9)}]\n" for i in range(16)),
    ],
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


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(path).data.train == "x.jsonl"


def test_a_length_is_in_updates_or_in_epochs(recipe_file: Path):
    def span(*overrides: str, rows: int = 120):
        return load_recipe(recipe_file, overrides).span(lambda: rows)

    assert span().steps == 200
    for epochs, rows, steps in ((2, 120, 15), (1, 120, 8), (0.5, 120, 4), (1, 128, 8), (1e-6, 120, 1)):
        assert span(f"run.epochs={epochs}", rows=rows).steps == steps
    two = span("run.epochs=2")
    assert two.describe(examples=120, global_examples=16) == "2 epochs of 120 examples: 15 updates"
    assert (
        span("run.steps=15").describe(examples=120, global_examples=16)
        == "15 updates: 2 epochs of 120 examples"
    )
    # 1.1 * 100 is a little more than 110 in floating point: rounded up it would be an update too many.
    assert span("run.epochs=1.1", "batch.global_examples=1", rows=100).steps == 110
    stopped = span("run.epochs=2", "run.stop_after_steps=3")
    assert (stopped.steps, stopped.last) == (15, 3)
    assert stopped.describe(examples=120, global_examples=16).endswith(", of which this run makes 3")
    # An earlier setting gives way by null, and what is written has no epochs any more.
    recipe_file.write_text(MINIMAL + "run: {steps: 60}\n")
    recipe = load_recipe(recipe_file, ["run.steps=null", "run.epochs=2"])
    run = recipe.with_steps(recipe.span(lambda: 120)).run
    assert (run.steps, run.epochs) == (15, None)


def test_rows_are_counted_only_where_the_length_depends_on_them(recipe_file: Path):
    def rows() -> int:
        raise AssertionError("the data were read")

    assert load_recipe(recipe_file, ["run.steps=7"]).span(rows).steps == 7
    with pytest.raises(AssertionError, match="were read"):
        load_recipe(recipe_file, ["run.epochs=7"]).span(rows)


# One of every type that YAML has, and what a slip of the hand makes of the right ones.
VALUES: list[Any] = [
    None, True, 5, 0, -1, 1.5, 0.5, "x", "", [], {}, [1], ["a"], ["a", 1], [None], {"a": 1}, {"a": "b"}, {1: 2, "b": 3},
    {1: "x"}, datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1, 3), float("nan"), float("inf"), 10**400, b"x",
    "\ud800", [[["a"]]], [0.9, 0.99], [0.9, "x"], [0.9], {"a": ["b"]},
]  # fmt: skip


def settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every section and every setting of every section, with a recipe around the place of its value."""
    base = {"model": {"from": "preset:tiny", "weights": "random"}, "data": {"train": "x.jsonl"}}
    for name, section in Recipe.model_fields.items():
        yield name, base
        if name == "method":
            for kind, spec in METHODS.items():
                yield from (
                    (f"method.{key}", base | {"method": {"kind": kind}})
                    for key in spec.model_fields
                    if key != "kind"
                )
        else:
            fields = section.annotation.model_fields  # type: ignore[union-attr]
            yield from ((f"{name}.{field.alias or key}", base) for key, field in fields.items())


@pytest.mark.parametrize(
    "value", VALUES, ids=lambda value: repr(value)[:20].encode("unicode_escape").decode()
)
def test_a_setting_of_any_type_is_taken_whole_or_refused_by_name(value: Any, tmp_path: Path):
    file = tmp_path / "r.yaml"
    for key, base in settings():
        tree = deepcopy(base)
        *parents, leaf = key.split(".")
        node = tree.setdefault(parents[0], {}) if parents else tree
        node[leaf] = value
        file.write_text(yaml.dump(tree))
        try:
            recipe = load_recipe(file)
        except RecipeError as error:
            line = str(error).removeprefix(f"{file}: ")
            assert line.startswith(key), key
            assert len(line) < 250, key
            assert "\n" not in line, key
            continue
        file.write_text(recipe.to_yaml())
        assert load_recipe(file) == recipe, key


@pytest.mark.parametrize(
    ("key", "value"), [("data.columns", {"a": "b"}), ("data.ignore", ["a"]), ("run.steps", 5)]
)
def test_settings_of_the_right_type_are_taken(key: str, value: Any, tmp_path: Path):
    """The control of the test above: it would also pass where everything is refused."""
    section, name = key.split(".")
    base = next(base for at, base in settings() if at == key)
    (tmp_path / "r.yaml").write_text(yaml.dump(base | {section: base.get(section, {}) | {name: value}}))
    load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("checkpoint={keep_best: 1, every_steps: 20}", "one every 100, and the last"),
        ("checkpoint={keep_best: 1, every_steps: 100}", None),
        ("checkpoint={every_steps: 20}", None),
    ],
)
def test_checkpoints_that_cannot_be_the_best_are_said(recipe_file: Path, settings: str, expected: str | None):
    recipe = load_recipe(recipe_file, ["data.heldout=x.jsonl", settings])
    lines = idle_settings(recipe, recipe.span(lambda: 100))
    assert len(lines) == (expected is not None)
    assert not expected or expected in lines[0]
