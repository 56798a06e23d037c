"""`trainspec show` says what a recipe means, and ends with 2 where it cannot be trained as it is."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from many import ended
from small import ROOT, SMALL

from trainspec.cli import main
from trainspec.families import PRESETS
from trainspec.methods import Full, LoRA, trainable_table
from trainspec.recipe import Recipe
from trainspec.show import group_entries

Make = Callable[..., Recipe]


@pytest.fixture
def show(make_recipe: Make, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Exit code, output and errors of `trainspec show` with settings on top of a small recipe."""

    def run(*settings: str, **sections: Any) -> dict[str, Any]:
        file = tmp_path / "r.yaml"
        file.write_text(make_recipe(**sections).to_yaml())
        return ended(main, ["show", str(file), *(word for s in settings for word in ("--set", s))])

    return run


def refused(result: dict[str, Any], message: str) -> None:
    assert result["code"] == 2, result
    [line] = result["err"].splitlines()
    assert message in line
    # Everything else is shown all the same, and still a recipe.
    assert yaml.safe_load(result["out"])["method"]["kind"] == "lora"
    assert "lora_A.weight" in result["out"]


def test_a_recipe_that_can_be_trained_is_shown_with_0(show):
    result = show("plan.fsdp=2", "plan.shards=optimizer")
    assert (result["code"], result["err"]) == (0, "")
    for line in (
        "#   base_model.model.model.layers.{0..1}.self_attn.q_proj.lora_A.weight [4, 32] x 2",
        "# 3 updates",
        "# jax: each of 2 devices holds",
        "# torch: each of 2 devices holds",
    ):
        assert any(shown.startswith(line) for shown in result["out"].splitlines()), line
    assert "no effect" not in result["out"]


@pytest.mark.parametrize(
    ("chunk", "said"), [("7", "# loss of 7 positions at once"), ("auto", "# loss of whole rows")]
)
def test_what_the_loss_makes_at_once_is_shown(show, chunk: str, said: str):
    result = show(f"plan.loss_chunk={chunk}")
    assert result["code"] == 0
    assert said in result["out"].splitlines()


def test_a_plan_that_one_backend_refuses_is_shown_with_0(show):
    result = show("plan.pipe=2", "plan.microbatches=2", "plan.schedule=gpipe")
    assert result["code"] == 0
    assert "# torch: plan.schedule=gpipe: DeepSpeed's pipeline runs 1f1b" in result["out"]


def test_a_plan_that_both_refuse(show):
    refused(show("plan.tensor=3"), "no backend runs this plan: plan.tensor=3 cannot split heads=4")
    # Each has its own reason: both are told.
    result = show(
        "plan.fsdp=5",
        "plan.shards=params",
        "batch.global_examples=5",
        "precision.policy=fp64",
        "precision.reduce=fp64",
    )
    refused(result, "no backend runs this plan: jax: plan.fsdp=5 cannot split embed=32")
    assert "; torch: plan.shards=params with precision.policy=fp64" in result["err"]


def test_positions_that_the_model_has_not(show):
    refused(
        show(f"data.sequence_tokens={SMALL.max_positions + 1}"), f"plain has {SMALL.max_positions} positions"
    )
    assert show(f"data.sequence_tokens={SMALL.max_positions}")["code"] == 0


def test_files_that_cannot_be_read(show, model_dirs: dict[str, Path], tmp_path: Path):
    shutil.copytree(model_dirs["plain"], tmp_path / "m")
    at = f"model.from={tmp_path / 'm'}"
    weights = tmp_path / "m/model.safetensors"
    whole = weights.read_bytes()
    assert show(at)["code"] == 0
    weights.write_bytes(whole[:-64])
    refused(show(at), "damaged or cut short")
    weights.unlink()
    refused(show(at), "neither model.safetensors nor")
    assert show(at, "model.weights=random")["code"] == 0  # they are not read
    weights.write_bytes(whole)
    refused(show(at, f"method.adapter={tmp_path / 'nowhere'}"), "nowhere")


def test_the_data_are_read_only_where_the_length_depends_on_them(show, tmp_path: Path):
    assert show("data.train=nowhere.jsonl")["code"] == 0
    refused(show("data.train=nowhere.jsonl", "run.steps=null", "run.epochs=2"), "nowhere.jsonl")
    result = show("run.steps=null", "run.epochs=2", "run.stop_after_steps=5", "schedule.warmup_ratio=0.1")
    [line] = [line for line in result["out"].splitlines() if "epochs of" in line]
    words = line.split()
    rows, updates = int(words[4]), int(words[6])
    assert line == f"# 2 epochs of {rows} examples: {updates} updates, of which this run makes 5"
    assert updates == -(-2 * rows // 4)
    assert f"# the rate warms up over {-(-updates // 10)} of {updates} updates" in result["out"]
    # `trainspec data`, which reads them anyway, says the same.
    file = str(tmp_path / "r.yaml")
    length = ["--set", "run.steps=null", "--set", "run.epochs=2"]
    data = ended(main, ["data", file, "--rows", "1", *length])
    assert data["out"].splitlines()[-1] == f"2 epochs of {rows} examples: {updates} updates"
    assert "epochs of" not in ended(main, ["data", file, "--split", "heldout", *length])["out"]


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("plan.schedule=gpipe", "no effect: plan.schedule=gpipe: there is no pipeline with plan.pipe=1"),
        ("plan.chunks=3", "no effect: plan.chunks=3: only a pipeline of plan.schedule=interleaved has chunks"),
        ("schedule.final_ratio=0.1", "no effect: schedule.final_ratio=0.1: schedule.kind=constant has no decay"),
        ("schedule.warmup_steps=3", "the rate never reaches its peak: the warm-up takes 3 of the schedule's 3 updates"),
    ],
)  # fmt: skip
def test_settings_without_an_effect_are_said(show, setting: str, line: str):
    assert f"# {line}\n" in show(setting)["out"]
    plain = show()["out"]
    assert "no effect" not in plain
    assert "peak" not in plain


def test_what_a_models_files_say_twice_is_shown(show, model_dirs: dict[str, Path], tmp_path: Path):
    shutil.copytree(model_dirs["plain"], tmp_path / "m")
    (tmp_path / "m/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "old.safetensors"}})
    )
    assert "there are two sets of weights" in show(f"model.from={tmp_path / 'm'}")["out"]


def test_rows_of_the_table_are_grouped_by_their_layers():
    model = PRESETS["llama2-7b"]
    lora = group_entries(trainable_table(model, LoRA(targets=("q_proj",))))
    assert lora == [
        "base_model.model.model.layers.{0..31}.self_attn.q_proj.lora_A.weight [8, 4096] x 32",
        "base_model.model.model.layers.{0..31}.self_attn.q_proj.lora_B.weight [4096, 8] x 32",
    ]
    some = group_entries(trainable_table(model, LoRA(targets=r"model\.layers\.(0|2|3|7|1\d)\.mlp\.up_proj")))
    assert some[0].startswith(
        "base_model.model.model.layers.{0,2..3,7,10..19}.mlp.up_proj.lora_A.weight [8, 4096] x 14"
    )
    one = group_entries(trainable_table(model, LoRA(targets=r"model\.layers\.5\.mlp\.up_proj")))
    assert one[0] == "base_model.model.model.layers.5.mlp.up_proj.lora_A.weight [8, 4096]"
    full = group_entries(trainable_table(model, Full()))
    assert full[0] == "model.embed_tokens.weight [32000, 4096]"
    assert len(full) == 3 + 9


# What takes a word's place in a damaged recipe, and letters that get in between.
WORDS = [
    "null", "true", "0", "-1", "2e-4", ".inf", ".nan", "[]", "{}", "[1, 2]", "{a: b}", "'x'", '"\\ud800"', '"\\0"', "&a",
    "*a", "!!int x", "!!map [1]", "2024-13-01", "tomorrow", "preset:tiny", "preset:x", ":", "- ", "%", "@", "? ", "<<: *a",
    "9" * 30, "9" * 5000, "0x" + "f" * 5000, "lora", "full", "prefix", "interleaved", "epochs: 2", "steps: null",
]  # fmt: skip
LETTERS = "\0\a\t\n\r\x1b\"'{}[]:,#\x7f\x85\xa0\ufeff\uffff\U0001f600"


def damaged(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(5):
            case 0 | 1:
                words = list(re.finditer(r"[^\s{},:\[\]]+", text)) or [re.match("", text)]
                word = rng.choice(words)
                text = text[: word.start()] + rng.choice(WORDS) + text[word.end() :]
            case 2:
                text = text[:at] + rng.choice(LETTERS) + text[at:]
            case 3:
                text = text[:at] + text[at + rng.randint(1, 12) :]
            case _:
                lines = text.splitlines(keepends=True)
                rng.shuffle(lines)
                text = "".join(lines)
    return text


def test_damaged_recipes_are_shown_or_refused_in_one_line(tmp_path: Path):
    """4,500 more of these were tried, and 768 damaged words of --set."""
    rng = random.Random(0)
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.yaml"))]
    codes = []
    for number in range(400):
        file = tmp_path / f"{number}.yaml"
        file.write_text(damaged(rng.choice(texts), rng), encoding="utf-8")
        result = ended(main, ["show", str(file)])
        codes.append(result["code"])
        assert result["code"] in (0, 2), f"{file}: {result['err']}"
        assert len(result["err"].splitlines()) == (1 if result["code"] else 0), f"{file}: {result['err']}"
    assert {0, 2} == set(codes)
