"""`trainspec import`: published configurations of other tools, settings that it must not lose, defaults, mistakes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainspec.backends import BACKENDS
from trainspec.cli import main, parser
from trainspec.errors import PlanError, RecipeError
from trainspec.imports import TOOLS, Imported, import_configuration
from trainspec.imports.command import answers
from trainspec.imports.report import recipe_text
from trainspec.recipe import Recipe, load_recipe, recipe_from
from trainspec.recipe_file import read_mapping
from trainspec.runs.run import check_plan, resolve

HOME = Path(__file__).parent / "configurations"
KINDS = ("axolotl", "llamafactory", "trl")
PUBLISHED: dict[str, dict[str, Any]] = {
    f"{kind}/{name}": case
    for kind in KINDS
    for name, case in yaml.safe_load((HOME / f"{kind}.yaml").read_text()).items()
}


def files(name: str) -> list[Path]:
    kind = name.partition("/")[0]
    named = PUBLISHED[name].get("files")
    return [HOME / kind / file for file in named] if named else [HOME / f"{name}.yaml"]


def imported(paths: list[Path], options: str = "") -> Imported:
    args = parser().parse_args(["import", *map(str, paths), *shlex.split(options)])
    return import_configuration(args.files, answers(args), changes=args.changes, drops=args.drops)


def names(tree: Any, prefix: str = "") -> Iterator[str]:
    """Every setting of a file, by dotted name: written apart from the importer's own."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from names(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, item in enumerate(value):
                yield from names(item, f"{prefix}{key}.{i}.")
        else:
            yield f"{prefix}{key}"


def read(path: Path) -> dict[str, Any]:
    return read_mapping(path, advice="", wanted="")


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_ten_of_each_kind(kind: str):
    assert sum(name.startswith(f"{kind}/") for name in PUBLISHED) >= 10


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_setting_is_accounted_for(name: str):
    result = imported(files(name))
    main_file, *beside = files(name)
    given = [n for n in names(read(main_file)) if n not in ("deepspeed", "adapter_config") or not beside]
    for path in beside:
        prefix = "adapter_config." if path.stem == "adapter_config" else "deepspeed."
        given += [f"{prefix}{n}" for n in names(read(path))]
    # A setting that is there and null is as if it were not there: it may be a default.
    lines = [line.name for line in result.lines if line.origin == "given" or line.name in given]
    assert sorted(lines) == sorted(given)
    assert [line.name for line in result.refused()] == PUBLISHED[name]["refused"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ways_out_lead_to_a_recipe(name: str, tmp_path: Path):
    case = PUBLISHED[name]
    result = imported(files(name), case["options"])
    recipe = result.recipe()
    assert {key: result.ours[key] for key in case["recipe"]} == case["recipe"]
    (tmp_path / "recipe.yaml").write_text(recipe_text(result), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    if "preset" in case:
        assert runs_somewhere(recipe, case["preset"])


def runs_somewhere(recipe: Recipe, preset: str) -> bool:
    """Whether a backend runs the recipe, with a preset in place of a model of the hub."""
    tree = recipe.model_dump(mode="json", by_alias=True)
    tree["model"] = {"from": f"preset:{preset}", "weights": "random"}
    run = resolve(recipe_from(tree))
    for backend in BACKENDS.values():
        try:
            check_plan(run, backend)
            return True
        except PlanError:
            continue
    return False


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_invented_setting_is_refused_in_every_file(name: str, tmp_path: Path):
    """The control of the tests above: nothing is dropped because nobody knows it."""
    for invented in files(name):
        paths = []
        for path in files(name):
            tree = read(path) | ({"invented_setting": None} if path == invented else {})
            paths.append(tmp_path / path.name)
            paths[-1].write_text(json.dumps(tree) if path.suffix == ".json" else yaml.safe_dump(tree))
        refused = {
            line.name.rpartition(".")[2] for line in imported(paths, PUBLISHED[name]["options"]).refused()
        }
        assert refused == {"invented_setting"}


def test_the_recipe_says_everything_that_decides_numbers():
    """Also where it is the tool's default, as ours may be another."""
    for name, case in PUBLISHED.items():
        ours = imported(files(name), case["options"]).ours
        for key in (
            "model.from", "method.kind", "data.train", "data.sequence_tokens", "data.packing", "data.loss_on",
            "batch.global_examples", "batch.accumulation", "precision.policy", "precision.reduce", "plan.remat",
            "optimizer.lr", "optimizer.betas", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip_norm",
            "schedule.kind", "run.steps", "run.seed",
        ):  # fmt: skip
            assert key in ours, (name, key)
        assert "schedule.warmup_steps" in ours or "schedule.warmup_ratio" in ours, name
        if ours["method.kind"] == "lora":
            assert {
                f"method.{key}" for key in ("rank", "alpha", "dropout", "rslora", "targets")
            } <= ours.keys(), name
