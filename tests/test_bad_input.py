"""A user's mistake gets one line that says what, where and the way out, and exit code 2, from every program."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from many import run_many
from safetensors.numpy import load_file, save_file

from trainspec.recipe import Recipe

Make = Callable[..., Recipe]


@pytest.fixture
def mistakes(
    make_recipe: Make, model_dirs: dict[str, Path], tmp_path: Path
) -> dict[str, tuple[list[str], str]]:
    """name -> (arguments behind `train`, what the line must say)."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(make_recipe().to_yaml())
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text(recipe.read_text() + "optimiser: {lr: 1}\n")
    gpt2 = copy_model(model_dirs["plain"], tmp_path / "gpt2")
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    cut = copy_model(model_dirs["plain"], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-64])
    missing, shape, extra = (
        copy_model(model_dirs["plain"], tmp_path / n) for n in ("missing", "shape", "extra")
    )
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = load_file(missing / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != name}, missing / "model.safetensors")
    save_file(tensors | {name: tensors[name].T.copy()}, shape / "model.safetensors")
    save_file(tensors | {"model.extra": tensors[name]}, extra / "model.safetensors")
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
    broken.write_text('{"instruction": "a", "output": "b"}\n{"instruction"\n')
    empty.write_text('{"instruction": "a", "output": ""}\n')
    model = lambda directory: [str(recipe), "--set", f"model.from={directory}"]  # noqa: E731
    change = lambda setting: [str(recipe), "--set", setting]  # noqa: E731
    return {
        "no recipe": ([str(tmp_path / "no.yaml")], "configs/demo.yaml"),
        "unknown key": ([str(unknown)], "optimiser: unknown key; did you mean 'optimizer'?"),
        "unknown key in --set": (change("optimizer.learning_rate=1"), "optimizer.learning_rate: unknown key"),
        "wrong type": (change("run.steps=many"), "run.steps"),
        "missing model directory": (model(tmp_path / "nowhere"), "no directory"),
        "unsupported architecture": (model(gpt2), "supported: LlamaForCausalLM"),
        "truncated safetensors": (model(cut), "damaged or cut short"),
        "missing tensor": (model(missing), f"{name} is missing"),
        "wrong shape": (model(shape), f"{name} has shape"),
        "unexpected tensor": (model(extra), "model.extra is unexpected"),
        "malformed jsonl": (change(f"data.train={broken}"), "line 2: not JSON"),
        "no usable record": (change(f"data.train={empty}"), "no usable record"),
        "target that matches nothing": (change("method.targets=[query]"), "these would match: down_proj"),
        "plan with no pipeline to fill": (change("plan.microbatches=2"), "or plan.microbatches=1"),
        "plan with more stages than layers": (change("plan.pipe=3"), "plan.pipe can be at most 2"),
        "plan with nothing to split over": (change("plan.shards=params"), "use plan.shards=nothing"),
        "plan that does not divide the model": (change("plan.tensor=3"), "plan.tensor can be 1, 2"),
        "plan that does not divide the batch": (change("plan.data=3"), "use batch.global_examples=6"),
        "nothing to resume": ([str(recipe), "--resume"], "--resume found no checkpoint"),
    }


def copy_model(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


@pytest.mark.parametrize("program", ["jaxtrain", "torchtrain"])
def test_mistakes_get_one_line_and_exit_code_2(program: str, mistakes, tmp_path: Path):
    cases = [
        ["train", *argv, "--out", str(tmp_path / f"out-{i}")] for i, (argv, _) in enumerate(mistakes.values())
    ]
    results = run_many(program, cases, tmp_path / program)
    for (name, (_, message)), result in zip(mistakes.items(), results, strict=True):
        assert result["code"] == 2, f"{name}: {result}"
        [line] = result["err"].strip().splitlines()
        assert line.startswith(f"{program}: "), name
        assert message in line, name


def test_trainspec_and_parity_say_the_same(mistakes, tmp_path: Path):
    argv, message = mistakes["missing model directory"]
    [show, data] = run_many("trainspec", [["show", *argv], ["data", *argv]], tmp_path / "trainspec")
    [check] = run_many("parity", [["check", *argv, "--out", str(tmp_path / "check")]], tmp_path / "parity")
    for result in (show, data, check):
        assert result["code"] == 2
        [line] = result["err"].strip().splitlines()
        assert message in line
