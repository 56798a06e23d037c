"""Qwen3's own: what its `config.json` says, what is refused, and the sizes that are published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from model_shapes import small_qwen3
from small import VARIANTS
from transformers import AutoConfig, Qwen3Config

from trainspec.errors import ModelError
from trainspec.families import PRESETS
from trainspec.files.hf import read_model
from trainspec.files.model_config import (
    config_notes,
    config_of,
    exported_config,
    model_spec_from_config,
    read_model_spec,
)
from trainspec.params import param_table

SPEC = VARIANTS["qwen3"]


def test_what_transformers_saves_is_read_and_written(tmp_path: Path):
    small_qwen3(
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ).save_pretrained(tmp_path)
    spec = read_model_spec(tmp_path)
    assert spec == replace(SPEC, name=tmp_path.name, vocab=323, max_positions=2048, init_std=0.02)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert config_notes(saved, where="x") == []
    assert exported_config(saved, spec) == saved
    (tmp_path / "config.json").write_text(json.dumps(config_of(spec)))
    assert AutoConfig.from_pretrained(tmp_path).to_dict().items() >= {
        "model_type": "qwen3", "head_dim": 12, "use_sliding_window": False, "tie_word_embeddings": True,
    }.items()  # fmt: skip
    assert read_model_spec(tmp_path) == spec


def test_absent_fields_are_transformers_defaults():
    needed = {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 320, "hidden_size": 40, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 64,
    }  # fmt: skip
    spec, theirs = model_spec_from_config(needed, name="x", where="x"), Qwen3Config(**needed)
    assert (spec.head_dim, spec.kv_heads) == (theirs.head_dim, theirs.num_key_value_heads)
    assert (spec.norm_eps, spec.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert spec.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (spec.attention_bias, spec.tied_embeddings) == (theirs.attention_bias, theirs.tie_word_embeddings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window: input should be False, not True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types.*not 'sliding_attention'"),
        ({"head_dim": None}, "head_dim: input should be a valid integer, not null"),
        ({"model_type": "llama"}, "architectures .'Qwen3ForCausalLM'. of model_type 'llama' are unsupported"),
    ],
)
def test_what_is_refused(change: dict, message: str):
    with pytest.raises(ModelError, match=message):
        model_spec_from_config(config_of(SPEC) | change, name="x", where="x")


def test_a_window_that_is_off_is_not_used():
    config = config_of(SPEC) | {"sliding_window": 4096, "max_window_layers": 1}
    assert model_spec_from_config(config, name=SPEC.name, where="x") == SPEC


def test_heads_need_not_divide_the_hidden_size():
    spec = replace(SPEC, embed=34)
    assert model_spec_from_config(config_of(spec), name=spec.name, where="x") == spec


def test_published_sizes():
    """As the hub counts the parameters of Qwen/Qwen3-0.6B and Qwen/Qwen3-8B."""
    assert sum(p.size for p in param_table(PRESETS["qwen3-0.6b"])) == 596_049_920
    assert sum(p.size for p in param_table(PRESETS["qwen3-8b"])) == 8_190_735_360


def test_weights_are_read_under_transformers_names(tmp_path: Path):
    model = small_qwen3(attention_bias=True)
    model.save_pretrained(tmp_path)
    spec = read_model_spec(tmp_path)
    state = model.state_dict()
    table = param_table(spec)
    assert {p.name for p in table} == set(state)
    for param, weight in read_model(tmp_path, spec, table, dtype=None):
        np.testing.assert_array_equal(weight[...], state[param.name].numpy())
