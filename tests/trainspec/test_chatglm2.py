"""ChatGLM2's published layout: read as transformers' GLM without code of the directory's own, and written back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from chatglm2 import CONFIG, write_published
from safetensors.numpy import load_file, save_file
from transformers import GlmConfig, GlmForCausalLM

from trainspec.errors import WeightsError
from trainspec.families import PRESETS
from trainspec.files.hf import read_model, resolve_model, write_model
from trainspec.files.model_config import config_notes, exported_config, read_config, read_model_spec
from trainspec.params import param_table
from trainspec.recipe import ModelSource


def stored(directory: Path) -> dict[str, np.ndarray]:
    return {
        name: a for file in sorted(directory.glob("*.safetensors")) for name, a in load_file(file).items()
    }


def read(directory: Path) -> dict[str, np.ndarray]:
    spec = read_model_spec(directory)
    return {p.name: weight[...] for p, weight in read_model(directory, spec, param_table(spec), dtype=None)}


def test_the_published_sizes():
    shapes = {p.name: p.shape for p in param_table(PRESETS["chatglm2-6b"])}
    assert shapes["model.layers.27.self_attn.q_proj.weight"] == (4096, 4096)
    assert shapes["model.layers.27.self_attn.k_proj.bias"] == (256,)
    assert shapes["model.layers.27.mlp.gate_up_proj.weight"] == (27392, 4096)
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (65024, 4096)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_there_and_back_bit_for_bit(tmp_path: Path, dtype: str):
    write_published(tmp_path / "base", dtype=dtype, shards=3)
    spec, before = read_model_spec(tmp_path / "base"), stored(tmp_path / "base")
    config = exported_config(read_config(tmp_path / "base"), spec)
    weights = [*read(tmp_path / "base").items()]
    kept = "transformer.rotary_pos_emb.inv_freq"
    write_model(
        tmp_path / "back",
        [*weights, (kept, before[kept])],
        companions_from=None,
        config=config,
        shard_bytes=9_000,
    )
    after = stored(tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert set(after) == set(before)
    for name, array in before.items():
        assert after[name].dtype == array.dtype == dtype
        np.testing.assert_array_equal(after[name], array)
    assert config == CONFIG | {"torch_dtype": dtype}
    assert json.loads((tmp_path / "back/config.json").read_text()) == config
    assert config_notes(config, where="x") == [
        "x: auto_map names code of the model's own, which is not run: the model is trained as transformers' GLM"
    ]


def test_slices_are_slices_of_the_fused_matrix(tmp_path: Path):
    write_published(tmp_path)
    spec = read_model_spec(tmp_path)
    fused = stored(tmp_path)["transformer.encoder.layers.1.self_attention.query_key_value.weight"]
    weights = {p.name: weight for p, weight in read_model(tmp_path, spec, param_table(spec), dtype=None)}
    q, k, v = (weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    np.testing.assert_array_equal(np.concatenate([q[...], k[...], v[...]]), fused)
    first = len(q[...])
    np.testing.assert_array_equal(k[slice(3, 7), slice(2, 5)], fused[first + 3 : first + 7, 2:5])
    np.testing.assert_array_equal(v[slice(-2, None), slice(None)], fused[-2:])


def test_transformers_glm_takes_its_weights(tmp_path: Path):
    """The names, with no permutation: every key is matched."""
    write_published(tmp_path)
    spec = read_model_spec(tmp_path)
    config = GlmConfig(
        vocab_size=spec.vocab, hidden_size=spec.embed, intermediate_size=spec.mlp, num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads, head_dim=spec.head_dim, pad_token_id=None,
    )  # fmt: skip
    weights = {name: torch.from_numpy(array) for name, array in read(tmp_path).items()}
    GlmForCausalLM(config).load_state_dict(weights, strict=True)


def test_what_does_not_fit_is_named_as_the_files_name_it(tmp_path: Path):
    write_published(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "transformer.encoder.layers.0.self_attention.query_key_value.bias"
    save_file(tensors | {name: tensors[name][:-1]}, file)
    with pytest.raises(WeightsError, match=rf"{name} has shape \[\d+\]; the configuration requires \[\d+\]"):
        read(tmp_path)
    save_file({key: array for key, array in tensors.items() if key != name}, file)
    with pytest.raises(WeightsError, match=f"{name} is missing"):
        read(tmp_path)
    save_file(tensors | {"transformer.prefix_encoder.embedding.weight": tensors[name][None]}, file)
    with pytest.raises(WeightsError, match=r"transformer.prefix_encoder.embedding.weight is unexpected"):
        read(tmp_path)


def test_it_is_resolved_without_code(tmp_path: Path):
    write_published(tmp_path)
    (tmp_path / "modeling_chatglm.py").write_text("raise SystemExit('this was run')")
    spec, directory = resolve_model(ModelSource.model_validate({"from": str(tmp_path)}))
    assert directory == tmp_path
    assert (spec.family, spec.rotary_dim) == ("chatglm2", 6)
