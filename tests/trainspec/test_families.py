"""What the `config.json` of each family says, what is refused, and the sizes that are published. transformers is the judge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_shapes import FAMILIES as CLASSES
from model_shapes import small_llama, small_model
from small import VARIANTS
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trainspec.errors import ModelError
from trainspec.families import FAMILIES, PRESETS
from trainspec.files.hf import read_model, write_model
from trainspec.files.model_config import (
    config_notes,
    config_of,
    exported_config,
    model_spec_from_config,
    read_model_spec,
)
from trainspec.params import param_table
from trainspec.rope import YarnScaling, inverse_frequencies, table_factor

NEW = ("qwen2", "mistral", "smollm3", "glm")
# Settings of a small model of each, none of them the default, and the spec's rule.
RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2": ({"tie_word_embeddings": True}, {"tied_embeddings": True, "attention_bias": True}),
    "mistral": ({"sliding_window": 37}, {"window": 37}),
    "smollm3": ({"num_hidden_layers": 9, "tie_word_embeddings": False}, {"layers": 9, "unrotated": (3, 7)}),
    "glm": (
        {"attention_bias": False, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.25}},
        {"attention_bias": False, "rotary_share": 0.25, "rotary_dim": 4, "rope_theta": 5e4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", NEW)
def test_what_transformers_saves_is_read_and_written(tmp_path: Path, family: str):
    settings, rules = RULES[family]
    model = small_model(family, **settings)
    model.save_pretrained(tmp_path)
    spec = read_model_spec(tmp_path)
    assert {name: getattr(spec, name) for name in rules} == rules
    saved = json.loads((tmp_path / "config.json").read_text())
    assert config_notes(saved, where="x") == []
    assert exported_config(saved, spec) == saved
    table = param_table(spec)
    weights = [(p.name, weight[...]) for p, weight in read_model(tmp_path, spec, table, dtype=None)]
    assert {name for name, _ in weights} == set(model.state_dict()) - (
        {"lm_head.weight"} if spec.tied_embeddings else set()
    )
    write_model(tmp_path / "ours", weights, companions_from=None, config=config_of(spec))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(theirs) is CLASSES[family][0]
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", NEW)
def test_absent_fields_are_transformers_defaults(family: str):
    needed = {
        "architectures": [FAMILIES[family].architecture], "vocab_size": 320, "hidden_size": 40, "intermediate_size": 48,
        "num_hidden_layers": 8, "num_attention_heads": 64,
    }  # fmt: skip
    if family in ("qwen2", "mistral", "smollm3"):
        needed["hidden_size"] = 640
    spec, theirs = model_spec_from_config(needed, name="x", where="x"), CLASSES[family][1](**needed)
    assert spec.head_dim == getattr(theirs, "head_dim", needed["hidden_size"] // 64)
    assert spec.kv_heads == theirs.num_key_value_heads
    assert (spec.norm_eps, spec.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert spec.rope_theta == theirs.rope_parameters["rope_theta"]
    assert spec.rotary_share == theirs.rope_parameters.get("partial_rotary_factor", 1)
    assert spec.tied_embeddings == theirs.tie_word_embeddings
    assert spec.window == (theirs.sliding_window if family == "mistral" else None)
    rotates = getattr(theirs, "no_rope_layers", [1] * 8)
    assert spec.unrotated == tuple(i for i in range(8) if not rotates[i])
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(CLASSES[family][1](**needed, pad_token_id=None)).state_dict()
    table = {p.name: p.shape for p in param_table(spec)}
    assert table == {name: tuple(state[name].shape) for name in table}
    assert set(state) - set(table) <= {"lm_head.weight"}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window: input should be False, not True"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "layer_types.*not 'sliding_attention'"),
        ("mistral", {"sliding_window": 0}, "sliding_window: input should be greater than or equal to 1, not 0"),
        ("mistral", {"layer_types": ["full_attention"]}, "layer_types: input should be None"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window: input should be False"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 2 layers"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("glm", {"rope_parameters": {"partial_rotary_factor": 0.1}}, "turns 1 of the 12 elements of a head"),
        ("glm", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "turns 18 of the 12 elements"),
        ("chatglm2", {"rope_ratio": 50}, "rope_ratio"),
        ("chatglm2", {"add_bias_linear": True}, "add_bias_linear: input should be False, not True"),
        ("chatglm2", {"multi_query_attention": False}, "multi_query_attention: input should be True"),
        ("chatglm2", {"pre_seq_len": 128}, "pre_seq_len: input should be None, not 128"),
        ("chatglm2", {"quantization_bit": 4}, "quantization_bit"),
        ("chatglm2", {"multi_query_group_num": 3}, "num_attention_heads 4 is not a multiple"),
        ("chatglm2", {"kv_channels": 10}, "kv_channels 10 is not a multiple of 4"),
    ],
)  # fmt: skip
def test_what_is_refused(family: str, change: dict, message: str):
    with pytest.raises(ModelError, match=message) as caught:
        model_spec_from_config(config_of(VARIANTS[family]) | change, name="x", where="x")
    assert "\n" not in str(caught.value)


def test_settings_that_a_family_does_not_have_are_named():
    config = config_of(VARIANTS["mistral"]) | {"attention_bias": True}
    (note,) = config_notes(config, where="x")
    assert note == "x: attention_bias true is not used: a Mistral always has the other"
    assert model_spec_from_config(config, name="small", where="x") == VARIANTS["mistral"]
    config = config_of(VARIANTS["qwen2"]) | {"sliding_window": 64, "max_window_layers": 1}
    assert model_spec_from_config(config, name="small", where="x") == VARIANTS["qwen2"]


def test_an_untied_head_is_said_where_the_default_is_tied():
    spec = replace(VARIANTS["smollm3"], tied_embeddings=False)
    config = config_of(spec)
    del config["tie_word_embeddings"]
    assert model_spec_from_config(config, name="small", where="x").tied_embeddings
    assert not model_spec_from_config(exported_config(config, spec), name="small", where="x").tied_embeddings


def test_published_sizes():
    """The numbers of parameters that the models' pages on the hub count."""
    published = {
        "llama3.1-8b": 8_030_261_248, "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824,
        "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512, "qwen3-32b": 32_762_123_264,
        "mistral-7b-v0.3": 7_248_023_552, "smollm3-3b": 3_075_098_624, "glm-4-9b": 9_399_951_360,
        "chatglm2-6b": 6_243_584_000,
    }  # fmt: skip
    assert {name: sum(p.size for p in param_table(PRESETS[name])) for name in published} == published


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"factor": 0.5},
        {"beta_fast": 16.0, "beta_slow": 2.0},
        {"attention_factor": 1.25},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"truncate": False},
        {"original_max_position_embeddings": 4},
        {"original_max_position_embeddings": None},
    ],
)
def test_yarn_is_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict):
    rope = {key: value for key, value in (YARN | change).items() if value is not None}
    small_llama(head_dim=32, rope_parameters=rope).save_pretrained(tmp_path)
    spec, theirs = read_model_spec(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert isinstance(spec.rope_scaling, YarnScaling)
    assert isinstance(theirs, LlamaConfig)
    assert model_spec_from_config(config_of(spec), name=spec.name, where="x") == spec
    single, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    assert table_factor(spec) == factor
    assert np.abs(inverse_frequencies(spec, np.float32) / single.numpy() - 1).max() < 1e-6
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    double, _ = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    assert double.dtype == torch.float64
    assert np.abs(inverse_frequencies(spec, np.float64) / double.numpy() - 1).max() < 1e-14
