"""From a chat file and a model directory to loss and gradients: both backends beside transformers alone, end to end.

The judge is `transformers_alone.py`, which shares nothing with us and takes every conversation by itself. Directories of different
shapes and families; conversations with system texts, tools, calls, thoughts, code and emoji, by a template that drops earlier
thoughts; padded on either side, and packed into one row.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from asked import asked_for
from many import ROOT, run_many
from model_shapes import SHAPES, make_model_shapes
from oracle.conversations import CONVERSATIONS
from oracle.templates import TAGGED
from safetensors.numpy import load_file
from small import CACHE

PROGRAMS = ("jaxtrain", "torchtrain")
CHATS = ("many_turns", "system", "tool_markup", "code", "emoji", "think_many")
CONTROL, CONTROL_OF = "prompt-trained", "torchtrain"
# How conversations become rows: settings of `data` and `batch`.
FILLED = {
    "left": ({"sequence_tokens": 1280, "padding_side": "left"}, {"global_examples": 6, "accumulation": 2}),
    "right": ({"sequence_tokens": 1280, "padding_side": "right"}, {"global_examples": 6, "accumulation": 2}),
    "packed": ({"sequence_tokens": 2048, "packing": True}, {"global_examples": 1}),
}
# Of the fast tests; the control is of the same model and rows.
FAST = ("tied", "left")
CASES = [
    pytest.param(shape, filled, marks=[] if (shape, filled) == FAST else pytest.mark.full(minutes=3))
    for shape in SHAPES
    for filled in FILLED
]
BOUND = {"exact": 1e-12, "as-is": 1e-6, "fp32": 1e-5}
# The rows of which there is a run in fp32, too.
FILLED_IN_FP32 = "left"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Traces of both backends and what transformers finds, for every directory that a selected test asks for."""
    home = tmp_path_factory.mktemp("alone")
    asked = {"tied", *asked_for(request, "shape")}
    runs = {filled: (filled, "fp64") for filled in ("left", *asked_for(request, "filled"))}
    if any(item.name.startswith("test_in_fp32") for item in request.session.items):
        runs["fp32"] = (FILLED_IN_FP32, "fp32")
    shapes = {name: path for name, path in make_model_shapes(home).items() if name in asked}
    records = [CONVERSATIONS[name] for name in CHATS]
    (home / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipes = {}
    for name, directory in shapes.items():
        (directory / "chat_template.jinja").write_text(TAGGED["qwen3"])
        for run, (filled, policy) in runs.items():
            data, batch = FILLED[filled]
            recipe = {
                "model": {"from": str(directory)},
                "method": {"kind": "full"},
                "data": {"train": str(home / "chats.jsonl"), "cache": str(CACHE), **data},
                "batch": batch,
                "precision": {"policy": policy},
                "run": {"steps": 1},
            }
            recipes[f"{name}-{run}"] = file = home / f"{name}-{run}.yaml"
            file.write_text(yaml.safe_dump(recipe))
    script = [sys.executable, str(ROOT / "tests/transformers_alone.py"), str(home / "chats.jsonl"), str(home)]
    subprocess.run([*script, *map(str, shapes.values())], check=True, cwd=ROOT)
    commands = {name: ["train", str(file)] for name, file in recipes.items()}
    control = {CONTROL: [*commands["-".join(FAST)], "--set", "data.loss_on=all"]}
    for program in PROGRAMS:
        lines = [
            [*command, "--out", str(home / program / name), "--trace", str(home / program / name / "trace")]
            for name, command in (commands | (control if program == CONTROL_OF else {})).items()
        ]
        for result in run_many(program, lines, home / program):
            assert result["code"] == 0, result
    return home


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest error as a share of the largest entry."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["exact", "as-is"])
@pytest.mark.parametrize(("shape", "filled"), CASES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_loss_and_gradients_are_those_of_transformers(
    home: Path, program: str, shape: str, filled: str, kind: str
):
    check_beside_transformers(home / program / f"{shape}-{filled}", home / f"{shape}-{kind}.npz", kind)


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_in_fp32_they_are_those_of_transformers_in_float32(home: Path, program: str, shape: str):
    check_beside_transformers(home / program / f"{shape}-fp32", home / f"{shape}-fp32.npz", "fp32")


def check_beside_transformers(run: Path, judge: Path, kind: str) -> None:
    wanted, trace = np.load(judge), run / "trace"
    assert wanted["longest"] > 500
    row = json.loads((trace / "trace.jsonl").read_text())
    step = load_file(trace / "step-000001.safetensors")
    assert row["tokens"] == wanted["tokens"]
    assert abs(row["loss"] - wanted["loss"]) <= BOUND[kind] * wanted["loss"]
    gradients = {name.removeprefix("gradient/") for name in step if name.startswith("gradient/")}
    assert gradients == set(wanted.files) - {"loss", "tokens", "longest"}
    if kind == "exact":
        for name in gradients:
            assert distance(step[f"gradient/{name}"], wanted[name]) <= BOUND[kind], name
    else:  # what transformers rounds to float32 reaches every tensor: the gradient is compared as one vector
        names = sorted(gradients)
        ours, theirs = (
            np.concatenate([tensors[f"{prefix}{n}"].ravel() for n in names])
            for tensors, prefix in ((step, "gradient/"), (wanted, ""))
        )
        assert np.linalg.norm(ours - theirs) <= BOUND[kind] * np.linalg.norm(theirs)


def test_the_bounds_see_what_is_wrong(home: Path):
    """Controls: a norm in float32 is outside the exact bound, a prompt that counts outside both."""
    exact, as_is = (np.load(home / f"tied-{kind}.npz") for kind in ("exact", "as-is"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert distance(as_is[name], exact[name]) > 10 * BOUND["exact"]
    step = load_file(home / CONTROL_OF / CONTROL / "trace/step-000001.safetensors")
    assert distance(step[f"gradient/{name}"], as_is[name]) > 1e3 * BOUND["as-is"]
