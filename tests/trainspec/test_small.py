"""A recipe's small twin keeps what is odd and shrinks sizes; what is set by hand stays."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
from small import QA

from trainspec.backends import BACKENDS
from trainspec.errors import RecipeError
from trainspec.families import PRESETS
from trainspec.files.hf import resolve_model
from trainspec.plans.capabilities import check_fits
from trainspec.plans.plan import Plan
from trainspec.recipe import load_recipe
from trainspec.small import small_model, small_plan, write_small_twin

PLANS = [
    Plan(),
    Plan(fsdp=8, shards="params"),
    Plan(pipe=4, data=2, fsdp=4, tensor=2, shards="optimizer", microbatches=8),
    Plan(pipe=2, microbatches=6, schedule="interleaved", chunks=4),
    Plan(pipe=3, microbatches=3, schedule="interleaved", chunks=3),
]


@pytest.fixture
def recipe(tmp_path, model_dirs) -> Path:
    """A large plan and batch for a small checkpoint."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {{from: {model_dirs['bias']}}}\n"
        f"data: {{train: {QA}, heldout: {QA}, sequence_tokens: 2048}}\n"
        "batch: {global_examples: 128, accumulation: 4}\n"
        "plan: {fsdp: 8, shards: params}\n"
        "run: {eval_generations: 3}\n"
    )
    return file


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"tiny"}))  # which has too few layers for these
def test_a_twin_keeps_how_sizes_relate_and_fits_its_plan(name: str, plan: Plan):
    spec = PRESETS[name]
    small = plan.model_copy(update=small_plan(plan))
    twin = small_model(spec, plan, small)
    assert all(
        (getattr(plan, axis) > 1) == (getattr(small, axis) > 1) for axis in ("pipe", "data", "fsdp", "tensor")
    )
    assert small.devices <= 16
    group, own = spec.heads // spec.kv_heads, twin.heads // twin.kv_heads
    assert (group > 1, spec.kv_heads > 1, group % 2) == (own > 1, twin.kv_heads > 1, own % 2)
    wide, narrow = spec.heads * spec.head_dim - spec.embed, twin.heads * twin.head_dim - twin.embed
    assert (wide > 0, wide < 0) == (narrow > 0, narrow < 0)
    assert bool(spec.unrotated) == bool(twin.unrotated)
    assert len(twin.unrotated) < twin.layers
    for flag in (
        "family",
        "tied_embeddings",
        "attention_bias",
        "mlp_bias",
        "rope_scaling",
        "norm_eps",
        "vocab",
        "rotary_share",
    ):
        assert getattr(twin, flag) == getattr(spec, flag), flag
    assert twin.embed * twin.layers <= 512
    for backend in BACKENDS.values():
        check_fits(
            small,
            twin,
            global_examples=2 * small.microbatches * small.replicas,
            accumulation=2,
            backend=backend,
        )


def test_a_window_stays_shorter_than_an_example():
    spec = replace(PRESETS["mistral-7b-v0.3"], window=4096)
    window = small_model(spec, Plan(), Plan()).window
    assert window is not None
    assert window < 128


def test_what_is_written_is_a_recipe_of_its_own(tmp_path, recipe):
    twin = write_small_twin(recipe, [], tmp_path / "small")
    written = load_recipe(tmp_path / "small" / "recipe.yaml")
    assert written == twin.recipe
    assert (written.plan.fsdp, written.plan.shards) == (2, "params")
    assert (written.batch.accumulation, written.batch.global_examples) == (2, 8)
    assert (written.data.sequence_tokens, written.data.too_long, written.data.heldout) == (128, "cut", None)
    spec, directory = resolve_model(written.model)
    assert directory is not None
    assert (spec.heads, spec.kv_heads, spec.attention_bias) == (4, 2, True)
    assert (directory / "tokenizer.json").is_file()
    assert not list(directory.glob("*.safetensors"))
    assert written.run.eval_generations == 0
    assert "plan.fsdp 8 -> 2" in twin.changed
    assert "run.eval_generations 3 -> 0" in twin.changed
    assert any("biases: attention, mlp" in line for line in twin.lines())


@pytest.mark.parametrize(
    ("preset", "kept"),
    [
        ("glm-4-9b", ["family glm", "biases: attention", "partial_rotary_factor 0.5"]),
        ("smollm3-3b", ["layers without rotation", "head tied to the embedding", "rope_theta 5e+06"]),
        ("qwen3-8b", ["family qwen3", "norm eps 1e-06", "biases: none", "head of its own"]),
        ("qwen3-0.6b", ["heads together wider than the residual stream"]),
        ("llama3.1-8b", ["rotation: llama3 (rope_theta 500000, factor 8, low_freq_factor 1, high_freq_factor 4"]),
        ("llama2-7b", ["one key/value head per query head", "vocabulary of 32000"]),
    ],
)  # fmt: skip
def test_what_is_kept_is_said(tmp_path, recipe, preset: str, kept: list[str]):
    settings = [f"model.from=preset:{preset}", "model.weights=random", f"data.tokenizer={tmp_path}"]
    said = write_small_twin(recipe, settings, tmp_path / "small").lines()[0]
    assert said.startswith("kept: ")
    assert all(part in said for part in kept), said


def test_of_the_hub_no_weights_are_fetched(tmp_path, recipe, model_dirs, monkeypatch):
    fetched = []

    def snapshot(name: str, *, allow_patterns) -> str:
        fetched.append(allow_patterns)
        return str(model_dirs["bias"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    write_small_twin(recipe, ["model.from=hub:org/name"], tmp_path / "small")
    patterns = [pattern for some in fetched for pattern in some]
    assert any(fnmatch("config.json", pattern) for pattern in patterns)
    weights = ("model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin")
    assert not any(fnmatch(name, pattern) for name in weights for pattern in patterns)
    resolve_model(load_recipe(recipe, ["model.from=hub:org/name"]).model)  # control: a run does
    assert any(fnmatch("model.safetensors", pattern) for pattern in fetched[-1])


def test_what_the_user_sets_stays(tmp_path, recipe):
    settings = ["plan.fsdp=4", "data.sequence_tokens=512", "batch.global_examples=32"]
    written = write_small_twin(recipe, settings, tmp_path / "small").recipe
    assert (written.plan.fsdp, written.data.sequence_tokens, written.batch.global_examples) == (4, 512, 32)
    assert written.batch.accumulation == 2


def test_no_weights_are_needed(tmp_path, recipe, model_dirs):
    for file in Path(model_dirs["bias"]).glob("*"):
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            target = tmp_path / "config-only" / file.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    settings = [f"model.from={tmp_path / 'config-only'}"]
    twin = write_small_twin(recipe, settings, tmp_path / "small")
    assert twin.model.attention_bias
    config = json.loads((tmp_path / "small" / "model" / "config.json").read_text())
    assert config["num_attention_heads"] == 4


def test_a_mistake_in_the_recipe_is_one_line(tmp_path, recipe):
    with pytest.raises(RecipeError, match=r"plan\.fsdp"):
        write_small_twin(recipe, ["plan.fsdp=0"], tmp_path / "small")
