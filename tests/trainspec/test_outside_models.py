"""Model directories against transformers alone: what it makes of config, weights and exports is what we make of them."""

import ast
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from model_shapes import (
    EMBEDDING,
    HEAD,
    SHAPES,
    TIED,
    edit_config,
    edit_weights,
    make_model_shapes,
    small_llama,
)
from oracle.tokenizers import make_tokenizers
from safetensors.numpy import load_file
from small import ROOT, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from whole_arrays import save_checkpoint

from trainspec.checkpoints.checkpoint import Checkpoint
from trainspec.checkpoints.export import export
from trainspec.checkpoints.identity import Identity, model_digest, weights_digest
from trainspec.checkpoints.manifest import read_manifest
from trainspec.errors import DataError, ModelError, RecipeError, WeightsError
from trainspec.files.adapters import read_adapter, write_adapter
from trainspec.files.hf import copy_tokenizer, model_notes, read_model, resolve_model, tokenizer_files
from trainspec.files.model_config import model_spec_from_config
from trainspec.methods import LoRA, adapter_table, trainable_table
from trainspec.model import ModelSpec
from trainspec.params import param_table
from trainspec.recipe import ModelSource, Recipe
from trainspec.rope import inverse_frequencies
from trainspec.runs.run import resolve
from trainspec.text.store import find_tokenizer

Make = Callable[..., Recipe]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
# What stands in published configs beside the sizes, shape by shape.
CONFIGS: dict[str, dict] = {
    "old spelling": {"architectures": ["LLaMAForCausalLM"], "rope_theta": 5e5},
    "no architectures": {"architectures": None},
    "tensor parallel": {"pretraining_tp": 2, "rope_scaling": None},
    "tied": {"tie_word_embeddings": True, "rope_theta": 100_000},
    "no kv heads": {"num_key_value_heads": None},
    "explicit head_dim": {"head_dim": 24},
    "int for float": {
        "rope_theta": 500_000,
        "attention_dropout": 0,
        "rope_scaling": LLAMA3 | {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
    },
    "both names of the type": {"rope_scaling": LLAMA3 | {"type": "llama3"}},
    "two types": {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
    "no type": {"rope_scaling": {"factor": 2.0}},
    "linear": {"rope_theta": 100_000, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, shrunk": {"rope_scaling": {"type": "linear", "factor": 0.5}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "new names": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": None},
    "two thetas": {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "theta inside and outside": {"rope_theta": 1e4, "rope_scaling": LLAMA3 | {"rope_theta": 5e5}},
    "both places, one model": {"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 1e4}},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 5e5}},
    "llama3 without its context": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    },
    "llama3's context outside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 256},
    "half of a head, plain": {"partial_rotary_factor": 0.5},
    "all of a head, linear": {
        "partial_rotary_factor": 1.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "swish": {"hidden_act": "swish"},
    "biases": {"attention_bias": True, "mlp_bias": True, "attention_dropout": None, "pretraining_tp": None},
    "later family's keys": {"rope_interleaved": False, "is_llama_config": True, "sliding_window": 64},
}


def a_config(**changes: object) -> dict:
    sizes = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 320, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    }  # fmt: skip
    return sizes | changes


FIELDS = {
    "vocab": "vocab_size", "embed": "hidden_size", "mlp": "intermediate_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps", "max_positions": "max_position_embeddings", "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias", "tied_embeddings": "tie_word_embeddings", "init_std": "initializer_range",
}  # fmt: skip


def assert_same_llama(ours: ModelSpec, theirs: LlamaConfig) -> None:
    assert {name: getattr(ours, name) for name in FIELDS} == {
        name: getattr(theirs, field) for name, field in FIELDS.items()
    }
    single = LlamaRotaryEmbedding(theirs).inv_freq.numpy()
    assert np.abs(inverse_frequencies(ours, np.float32) / single - 1).max() < 1e-6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)  # in which transformers' own functions then compute
        double = LlamaRotaryEmbedding(theirs).inv_freq.numpy()
    assert double.dtype == np.float64
    assert np.abs(inverse_frequencies(ours, np.float64) / double - 1).max() < 1e-14


def their_config(config: dict, directory: Path) -> LlamaConfig:
    (directory / "config.json").write_text(json.dumps(config))
    found = AutoConfig.from_pretrained(directory)
    assert isinstance(found, LlamaConfig)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_the_llama_that_transformers_makes_of_it(tmp_path: Path, name: str):
    config = a_config(**CONFIGS[name])
    assert_same_llama(model_spec_from_config(config, name="x", where="x"), their_config(config, tmp_path))


# What the settings of one kind may be, beside one another; null is left out, as transformers 5 takes none.
CHOICES: dict[str, list] = {
    "rope_scaling": [c["rope_scaling"] for c in CONFIGS.values() if "rope_scaling" in c],
    "rope_parameters": [c["rope_parameters"] for c in CONFIGS.values() if "rope_parameters" in c],
    "rope_theta": [1e4, 5e5, 100_000],
    "partial_rotary_factor": [None, 0.5, 1.0],
    "original_max_position_embeddings": [256, 4096],
    "head_dim": [None, 16, 24],
    "num_key_value_heads": [None, 1, 4],
    "max_position_embeddings": [128, 4096],
    "hidden_size": [64, 66, 128],
    "hidden_act": ["silu", "swish", "gelu"],
    "attention_bias": [True],
    "tie_word_embeddings": [True, False],
}


def test_random_configs_are_transformers_llamas_or_refused(tmp_path: Path):
    draws, alike = random.Random(0), 0
    for _ in range(200):
        keys = draws.sample(list(CHOICES), draws.randint(1, 6))
        config = a_config(**{key: draws.choice(CHOICES[key]) for key in keys})
        try:
            spec = model_spec_from_config(config, name="x", where="x")
        except ModelError:
            continue
        assert_same_llama(spec, their_config(config, tmp_path))
        alike += 1
    assert alike > 100


def test_a_dynamic_base_is_the_plain_one_up_to_max_positions_and_not_behind(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(a_config(**CONFIGS["dynamic"])))
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    plain = rotary.inv_freq.clone()
    rotary(torch.zeros(1), torch.arange(2048)[None])
    assert torch.equal(rotary.inv_freq, plain)
    rotary(torch.zeros(1), torch.arange(2049)[None])
    assert not torch.equal(rotary.inv_freq, plain)


def test_null_switches_are_their_defaults():
    """transformers 5 refuses them; files of older versions have them."""
    nulls = (
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
        "rope_theta",
        "head_dim",
        "num_key_value_heads",
    )
    spec = model_spec_from_config(a_config(**dict.fromkeys(nulls)), name="x", where="x")
    assert spec == model_spec_from_config(a_config(num_key_value_heads=4), name="x", where="x")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_model_shapes(tmp_path_factory.mktemp("shapes"))


def source_of(directory: Path) -> ModelSource:
    return ModelSource.model_validate({"from": str(directory)})


def assert_read_alike(directory: Path) -> ModelSpec:
    """Every weight of ours is transformers', to the last bit, and what is tied is tied there."""
    spec, _ = resolve_model(source_of(directory))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    state = theirs.state_dict()
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == spec.tied_embeddings
    table = param_table(spec)
    assert {p.name for p in table} | {HEAD} == set(state)
    for param, weight in read_model(directory, spec, table, dtype=np.float64):
        assert np.array_equal(weight[...], state[param.name].numpy()), param.name
    return spec


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_that_transformers_loads(shapes: dict[str, Path], name: str):
    assert assert_read_alike(shapes[name]).tied_embeddings == (name in TIED)


def a_model(directory: Path, **changes: object) -> Path:
    small_llama(**changes).save_pretrained(directory)  # type: ignore[arg-type]
    write_tokenizer(directory)
    return directory


def test_a_tied_model_may_store_the_head_alone(tmp_path: Path):
    a_model(tmp_path, tie_word_embeddings=True)
    table = torch.from_numpy(load_file(tmp_path / "model.safetensors")[EMBEDDING])
    edit_weights(tmp_path, remove=(EMBEDDING,), lm_head__weight=table)
    assert assert_read_alike(tmp_path).tied_embeddings
    assert model_notes(source_of(tmp_path), *resolve_model(source_of(tmp_path))) == []


def test_an_equal_head_is_tied_and_one_number_makes_it_its_own(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("trainspec.files.hf.COMPARED_BYTES", 1000)  # several parts
    a_model(tmp_path, tie_word_embeddings=True)
    table = torch.from_numpy(load_file(tmp_path / "model.safetensors")[EMBEDDING])
    edit_weights(tmp_path, lm_head__weight=table.clone())
    assert assert_read_alike(tmp_path).tied_embeddings
    assert model_notes(source_of(tmp_path), *resolve_model(source_of(tmp_path))) == []
    table = table.clone()
    table[-1, -1] += 1e-6
    edit_weights(tmp_path, lm_head__weight=table)
    assert not assert_read_alike(tmp_path).tied_embeddings
    (note,) = model_notes(source_of(tmp_path), *resolve_model(source_of(tmp_path)))
    assert "tie_word_embeddings is true, but lm_head.weight and model.embed_tokens.weight are two" in note


def test_drawn_weights_are_tied_as_the_config_says(shapes: dict[str, Path]):
    source = ModelSource.model_validate({"from": str(shapes["own-head"]), "weights": "random"})
    assert resolve_model(source)[0].tied_embeddings
    assert model_notes(source, *resolve_model(source)) == []


def test_notes_of_the_shapes(shapes: dict[str, Path]):
    notes = {
        name: model_notes(source_of(path), *resolve_model(source_of(path))) for name, path in shapes.items()
    }
    assert [name for name, found in notes.items() if found] == ["own-head", "stale-index"]
    assert (
        "there are two sets of weights; as in transformers, model.safetensors is read"
        in notes["stale-index"][0]
    )
    assert not [note for found in notes.values() for note in found if "\n" in note]
    assert (
        model_notes(
            ModelSource.model_validate({"from": "preset:tiny", "weights": "random"}),
            *resolve_model(ModelSource.model_validate({"from": "preset:tiny", "weights": "random"})),
        )
        == []
    )


def test_an_index_that_names_absent_shards_is_one_line(tmp_path: Path):
    small_llama().save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(OSError, match="model-00002-of-00004"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    spec, _ = resolve_model(source_of(tmp_path))
    with pytest.raises(
        WeightsError, match=r"names 4 files, 1 of them missing, 'model-00002-of-00004"
    ) as caught:
        read_model(tmp_path, spec, param_table(spec), dtype=np.float32)
    assert "\n" not in str(caught.value)


def run_named_python(message: str) -> None:
    """Runs what stands after `python -c` in an error."""
    exec(message.split('python -c "')[1].removesuffix('"'), {})


def run_named_command(message: str) -> Path:
    """Runs what stands after `convert it:` in an error; returns the directory that it writes."""
    from torchtrain.cli import main

    program, *words = message.split("convert it: ")[1].split()
    assert program == "torchtrain"
    assert main(words) == 0
    return Path(words[-1])


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path):
    small_llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    spec, _ = resolve_model(source_of(tmp_path))
    with pytest.raises(WeightsError, match="only a Git LFS pointer"):
        read_model(tmp_path, spec, param_table(spec), dtype=np.float32)


def test_stored_frequencies_are_passed_over(tmp_path: Path):
    a_model(tmp_path)
    old = {f"model__{at}rotary_emb__inv_freq": torch.ones(6) for at in ("", "layers__0__self_attn__")}
    edit_weights(tmp_path, **old)
    assert_read_alike(tmp_path)


def test_pytorch_weights_are_named_and_the_named_command_converts_them(tmp_path: Path):
    model = small_llama()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    spec, _ = resolve_model(source_of(tmp_path))
    with pytest.raises(WeightsError, match=r"pytorch_model.bin is not supported") as caught:
        read_model(tmp_path, spec, param_table(spec), dtype=np.float32)
    assert_read_alike(run_named_command(str(caught.value)))


def test_a_pytorch_adapter_is_named_and_the_named_command_converts_it(tmp_path: Path):
    base, directory = a_model(tmp_path / "base"), tmp_path / "adapter"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(directory, safe_serialization=False)
    file = directory / "adapter_model.bin"
    if not file.exists():  # newer PEFT writes safetensors alone
        from safetensors.torch import load_file as load

        torch.save(load(directory / "adapter_model.safetensors"), file)
        (directory / "adapter_model.safetensors").unlink()
    method = LoRA(rank=4, alpha=8.0, targets=("q_proj",))
    spec, _ = resolve_model(source_of(base))
    table = adapter_table(spec, method)
    with pytest.raises(WeightsError, match=r"adapter_model.bin: is not supported") as caught:
        read_adapter(directory, spec, method, table, dtype=np.float32)
    directory = run_named_command(str(caught.value))
    assert len(list(read_adapter(directory, spec, method, table, dtype=np.float32))) == len(table)


def test_an_adapter_beside_a_model_is_refused(tmp_path: Path):
    a_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter as well as the model"):
        resolve_model(source_of(tmp_path))


def trained_lora(
    make_recipe: Make, base: Path, out: Path, *, method: dict | None = None, **data: str
) -> Recipe:
    """A recipe on `base` with a checkpoint of drawn weights under `out`."""
    recipe = make_recipe(
        model={"from": str(base)},
        data=data,
        method=method or {"kind": "lora", "rank": 2, "alpha": 4.0, "targets": "all-linear"},
    )
    spec, _ = resolve_model(recipe.model)
    draws = np.random.default_rng(0)
    arrays = {
        p.name: 0.1 * draws.normal(size=p.shape).astype(np.float32)
        for p in trainable_table(spec, recipe.method)
    }
    zeros = {name: np.zeros_like(array) for name, array in arrays.items()}
    save_checkpoint(out, Checkpoint(3, arrays, zeros, zeros), recipe=recipe)
    return recipe


@pytest.mark.parametrize("name", SHAPES)
def test_a_merged_model_is_the_one_that_peft_merges(
    make_recipe: Make, shapes: dict[str, Path], tmp_path: Path, name: str
):
    base = shapes[name]
    recipe = trained_lora(make_recipe, base, tmp_path)
    merged = export(recipe, out=tmp_path, merge=True, dtype="float64")
    adapter = export(recipe, out=tmp_path, merge=False)
    torch.set_default_dtype(torch.float64)
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        model = peft.PeftModel.from_pretrained(
            model, adapter, autocast_adapter_dtype=False
        ).merge_and_unload()
    finally:
        torch.set_default_dtype(torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(merged)
    assert ours.dtype == torch.float64  # as config.json says
    for key, theirs in model.state_dict().items():
        assert torch.allclose(ours.state_dict()[key], theirs, rtol=0, atol=1e-12), key
    assert ours.config.tie_word_embeddings == (name in TIED)
    assert model_notes(source_of(merged), *resolve_model(source_of(merged))) == []


def test_merged_weights_keep_the_types_of_the_base(
    make_recipe: Make, shapes: dict[str, Path], tmp_path: Path
):
    recipe = trained_lora(make_recipe, shapes["bf16"], tmp_path)
    merged = export(recipe, out=tmp_path, merge=True)
    assert {a.dtype for a in load_file(merged / "model.safetensors").values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    config = json.loads((merged / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    exact = load_file(export(recipe, out=tmp_path, merge=True, dtype="float64") / "model.safetensors")
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float64"
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in exact.items()}
    again = load_file(export(recipe, out=tmp_path, merge=True) / "model.safetensors")
    assert all(np.array_equal(again[name], array) for name, array in rounded.items())


def test_a_base_of_two_types_keeps_both(make_recipe: Make, tmp_path: Path):
    base = a_model(tmp_path / "base")
    norm = torch.ones(32, dtype=torch.bfloat16)
    edit_weights(base, model__norm__weight=norm)
    merged = export(trained_lora(make_recipe, base, tmp_path), out=tmp_path, merge=True)
    found = load_file(merged / "model.safetensors")
    assert found.pop("model.norm.weight").dtype == ml_dtypes.bfloat16
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float32"


def test_what_dtype_cannot_do_is_said(make_recipe: Make, tmp_path: Path):
    base = a_model(tmp_path / "base")
    edit_weights(base, model__norm__weight=torch.full((32,), 1e5))
    recipe = trained_lora(make_recipe, base, tmp_path)
    with pytest.raises(WeightsError, match=r"model.norm.weight has values that are too large for float16"):
        export(recipe, out=tmp_path, merge=True, dtype="float16")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(RecipeError, match="this is an adapter; leave it out, or fold"):
        export(recipe, out=tmp_path, merge=False, dtype="float16")


def test_a_whole_model_is_stored_as_told(make_recipe: Make, shapes: dict[str, Path], tmp_path: Path):
    recipe = trained_lora(make_recipe, shapes["bf16"], tmp_path, method={"kind": "full"})
    for dtype, stored in ((None, "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")):
        target = export(recipe, out=tmp_path, merge=False, dtype=dtype)
        assert {str(a.dtype) for a in load_file(target / "model.safetensors").values()} == {stored}
        assert AutoConfig.from_pretrained(target).dtype == getattr(torch, stored)


# A tokenizer of every kind of file; what is no tokenizer's stays where it is.
FILES = (
    "added_tokens.json", "additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja",
    "bpe.codes", "chat_template.jinja", "chat_template.json", "merges.txt", "qwen.tiktoken", "sentencepiece.bpe.model",
    "special_tokens_map.json", "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer.model.v3",
    "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
OTHERS = ("README.md", "optimizer.pt", "notes.txt", "model.safetensors.index.json.bak", "examples/a.jinja")


def fill(directory: Path, mark: str) -> None:
    for name in (*FILES, *OTHERS):
        (directory / name).parent.mkdir(exist_ok=True, parents=True)
        if not (directory / name).exists():
            (directory / name).write_text(f"{mark} {name}")


def test_the_files_of_a_tokenizer(tmp_path: Path):
    fill(tmp_path, "x")
    assert [str(path) for path in tokenizer_files(tmp_path)] == sorted(FILES)
    assert tokenizer_files(tmp_path / "nowhere") == []


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_an_export_has_the_whole_tokenizer_that_was_trained_with(
    make_recipe: Make, tmp_path: Path, merge: bool, own: bool
):
    base, other = a_model(tmp_path / "base"), tmp_path / "other"
    fill(base, "base")
    other.mkdir()
    write_tokenizer(other)
    (other / "vocab.json").write_text("other")
    data = {"tokenizer": str(other)} if own else {}
    target = tmp_path / ("merged" if merge else "adapter")
    target.mkdir()
    fill(target, "an earlier export, with another tokenizer")
    export(trained_lora(make_recipe, base, tmp_path, **data), out=tmp_path, merge=merge)
    source = other if own else base
    assert tokenizer_files(target) == tokenizer_files(source)
    for path in tokenizer_files(source):
        assert (target / path).read_bytes() == (source / path).read_bytes()
    assert (target / "README.md").read_text().startswith("an earlier export")


def test_an_export_has_the_chat_template_that_was_trained_with(make_recipe: Make, tmp_path: Path):
    base, file = a_model(tmp_path / "base"), tmp_path / "mine.jinja"
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "the model's own"}))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text("the model's own, for tools")
    file.write_text("{{ messages[0].content }} – mine", encoding="utf-8")
    recipe = trained_lora(make_recipe, base, tmp_path, chat_template=str(file))
    for merge in (False, True):
        target = export(recipe, out=tmp_path, merge=merge)
        assert AutoTokenizer.from_pretrained(target).chat_template == file.read_text(encoding="utf-8")
    file.unlink()
    with pytest.raises(DataError, match=r"data.chat_template: no file"):
        export(recipe, out=tmp_path, merge=True)


def test_a_tokenizer_that_has_changed_since_the_run_is_said(make_recipe: Make, tmp_path: Path):
    base = a_model(tmp_path / "base")
    recipe = trained_lora(make_recipe, base, tmp_path)
    (newest,) = (tmp_path / "checkpoints").glob("step-*")
    spec = resolve_model(recipe.model)[0]
    digests = {
        "model": model_digest(spec),
        "weights": weights_digest(resolve(recipe)),
        "tokenizer": find_tokenizer(recipe.data, base, "").digest,
        "data": "",
        "method": "",
    }
    replace(read_manifest(newest), identity=Identity(**digests)).write(newest)
    said: list[str] = []
    export(recipe, out=tmp_path, merge=True, say=said.append)
    assert said == []
    (base / "added_tokens.json").write_text("{}")
    export(recipe, out=tmp_path, merge=True, say=said.append)
    (line,) = said
    assert "the tokenizer's files have changed since the run" in line


def ids_of(directory: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = ("Größe  a\n def f():\n", " b", "<s>[INST] hi [/INST]</s> x", "<|im_start|>user\n12<|im_end|>")
    return [tokenizer.encode(text, add_special_tokens=add) for text in texts for add in (True, False)]


def test_a_copied_tokenizer_gives_the_same_ids_beside_a_llama_and_alone(tmp_path: Path):
    for name, path in make_tokenizers(tmp_path / "made").items():
        alone, beside = tmp_path / f"{name}-alone", tmp_path / f"{name}-beside"
        for target in (alone, beside):
            target.mkdir()
            copy_tokenizer(path, target, chat_template=None)
        (beside / "config.json").write_text(json.dumps(a_config()))
        assert ids_of(alone) == ids_of(beside) == ids_of(path), name


def test_a_tokenizer_that_would_be_another_class_is_refused_and_the_named_command_keeps_it(
    make_recipe: Make, tmp_path: Path, monkeypatch
):
    """transformers reads Llama's tokenizer.json as Qwen's beside a config.json that says qwen2."""
    base, other = a_model(tmp_path / "base"), tmp_path / "other"
    shutil.copytree(make_tokenizers(tmp_path / "made")["prepend"], other)
    alone = ids_of(other)
    (other / "config.json").write_text(json.dumps(a_config(model_type="qwen2")))
    assert ids_of(other) != alone
    recipe = trained_lora(make_recipe, base, tmp_path, tokenizer=str(other))
    with pytest.raises(RecipeError, match="model_type 'qwen2', by which transformers chooses") as caught:
        export(recipe, out=tmp_path, merge=True)
    monkeypatch.chdir(tmp_path)
    run_named_python(str(caught.value).split(", and set data")[0])
    kept = trained_lora(make_recipe, base, tmp_path / "again", tokenizer=str(tmp_path / "NEW"))
    for merge in (False, True):
        assert ids_of(export(kept, out=tmp_path / "again", merge=merge)) == ids_of(other)


def test_exports_of_odd_configs_are_loaded_by_transformers(make_recipe: Make, tmp_path: Path):
    """Nulls that transformers does not take, two thetas, a padding id without a row."""
    base = a_model(tmp_path / "base")
    edit_config(
        base, attention_bias=None, mlp_bias=None, tie_word_embeddings=None, rope_theta=1e3, pad_token_id=323,
        architectures=["LLaMAForCausalLM"],
    )  # fmt: skip
    assert len(model_notes(source_of(base), *resolve_model(source_of(base)))) == 2
    recipe = trained_lora(make_recipe, base, tmp_path)
    assert_read_alike(export(recipe, out=tmp_path, merge=True))


def test_files_are_read_as_utf_8_whatever_the_locale_says(tmp_path: Path):
    base = a_model(tmp_path / "base", tie_word_embeddings=True)
    file = base / "config.json"
    config = json.loads(file.read_text()) | {"_name_or_path": "größe"}
    file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    spec, method = resolve_model(source_of(base))[0], LoRA()
    weights = {p.name: np.ones(p.shape) for p in adapter_table(spec, method)}
    write_adapter(tmp_path / "a", weights, model=spec, method=method, base="x")
    adapter_config = tmp_path / "a/adapter_config.json"
    words = json.loads(adapter_config.read_text()) | {"base_model_name_or_path": "größe"}
    adapter_config.write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
    code = (
        "import locale, sys\nfrom pathlib import Path\nfrom trainspec.files.adapters import read_adapter\n"
        "from trainspec.files.hf import model_notes, resolve_model\nfrom trainspec.methods import LoRA, adapter_table\n"
        "from trainspec.recipe import ModelSource\n"
        "assert locale.getpreferredencoding(False) != 'UTF-8'\n"
        "here = Path(sys.argv[1])\n"
        "source = ModelSource.model_validate({'from': str(here / 'base')})\n"
        "spec, _ = resolve_model(source)\n"
        "assert model_notes(source, *resolve_model(source)) == []\n"
        "list(read_adapter(here / 'a', spec, LoRA(), adapter_table(spec, LoRA()), dtype='float32'))\n"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, env=os.environ | plain, cwd=ROOT)


def test_every_text_file_is_opened_with_its_encoding():
    """LC_ALL=C would else decide it."""
    for package in ("trainspec", "jaxtrain", "torchtrain", "parity"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and _is_text_file(node):
                    assert "encoding" in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"


def _is_text_file(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    on_module = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "os"
    return name == "open" and not on_module and not any("b" in mode for mode in modes)
