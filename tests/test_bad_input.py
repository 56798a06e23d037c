"""A user's mistake gets one line that says what, where and the way out, and exit code 2, from every program."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from many import run_many
from safetensors.numpy import load_file, save_file
from small import recipe_maker

from trainspec.command import backend_parser

MISTAKES = (
    "no recipe", "unknown key", "unknown key in --set", "wrong type", "missing model directory",
    "unsupported architecture", "truncated safetensors", "missing tensor", "wrong shape", "unexpected tensor",
    "malformed jsonl", "no usable record", "target that matches nothing", "plan with no pipeline to fill",
    "plan with more stages than layers", "plan with nothing to split over", "plan that does not divide the model",
    "plan that does not divide the batch", "nothing to resume",
)  # fmt: skip


@pytest.fixture(scope="module")
def mistakes(
    model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[str], str]]:
    """name -> (arguments after `train`, what the line must say)."""
    tmp_path = tmp_path_factory.mktemp("mistakes")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(recipe_maker(model_dirs)().to_yaml())
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


@pytest.fixture(scope="module")
def ended(
    mistakes: dict[str, tuple[list[str], str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, dict[str, Any]]]:
    """How every mistake ended in a program, by name."""

    @cache
    def run(program: str) -> dict[str, dict[str, Any]]:
        home = tmp_path_factory.mktemp(program)
        cases = [
            ["train", *argv, "--out", str(home / f"out-{i}")] for i, (argv, _) in enumerate(mistakes.values())
        ]
        return dict(zip(mistakes, run_many(program, cases, home / "launch"), strict=True))

    return run


@pytest.mark.parametrize("program", ["jaxtrain", "torchtrain"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(
    program: str,
    mistake: str,
    mistakes: dict[str, tuple[list[str], str]],
    ended: Callable[[str], dict[str, dict[str, Any]]],
):
    result = ended(program)[mistake]
    assert result["code"] == 2, result
    [line] = result["err"].strip().splitlines()
    assert line.startswith(f"{program}: ")
    assert mistakes[mistake][1] in line


def test_an_empty_out_is_no_directory(capsys: pytest.CaptureFixture[str]):
    """As of a variable that is not set: the run would be in the directory that one is in."""
    parser = backend_parser("jaxtrain")
    assert parser.parse_args(["train", "r.yaml", "--out", "."]).out == Path()  # control
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["train", "r.yaml", "--out", ""])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--out: no directory is named; give one" in line


def test_every_mistake_is_tried(mistakes: dict[str, tuple[list[str], str]]):
    assert tuple(mistakes) == MISTAKES


def test_trainspec_and_parity_say_the_same(mistakes, tmp_path: Path):
    argv, message = mistakes["missing model directory"]
    [show, data] = run_many("trainspec", [["show", *argv], ["data", *argv]], tmp_path / "trainspec")
    [check] = run_many("parity", [["check", *argv, "--out", str(tmp_path / "check")]], tmp_path / "parity")
    for result in (show, data, check):
        assert result["code"] == 2
        [line] = result["err"].strip().splitlines()
        assert message in line
