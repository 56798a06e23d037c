"""Every preset is what the published `config.json` of its checkpoint says, setting by setting.

The settings are facts of the files on the hub, as other projects quote them with links: litgpt's `config.py` for Llama, Qwen and
Mistral, and for SmolLM3, GLM and ChatGLM2 the configurations that are quoted in tests and model pages of several
repositories. Rotary settings are written as they were when the checkpoint was published.
"""

from __future__ import annotations

from typing import Any

import pytest

from trainspec.families import PRESETS
from trainspec.files.model_config import model_spec_from_config

Config = dict[str, Any]


def decoder(model_type: str, architecture: str, sizes: tuple[int, ...], **settings: Any) -> Config:
    """The settings that all but ChatGLM2 have, in the order vocabulary, width, layers, heads, kv heads, MLP."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")  # fmt: skip
    common = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "initializer_range": 0.02,
    }
    return common | dict(zip(names, sizes, strict=True)) | settings


def llama(sizes: tuple[int, ...], **settings: Any) -> Config:
    usual = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "pretraining_tp": 1, "rope_scaling": None}
    return decoder("llama", "LlamaForCausalLM", sizes, **(usual | settings))


def llama3(
    sizes: tuple[int, ...], factor: float | None, *, positions: int = 131072, **settings: Any
) -> Config:
    scaling = factor and {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    rules = {"rope_theta": 500000.0, "rope_scaling": scaling, "max_position_embeddings": positions}
    return llama(sizes, attention_bias=False, mlp_bias=False, **rules, **settings)


def qwen(model_type: str, sizes: tuple[int, ...], positions: int, *, tied: bool, **settings: Any) -> Config:
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model_type]
    rules = {
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": positions, "tie_word_embeddings": tied,
        "use_sliding_window": False,
    }  # fmt: skip
    return decoder(model_type, architecture, sizes, **rules, **settings)


def qwen3(sizes: tuple[int, ...], *, tied: bool) -> Config:
    return qwen("qwen3", sizes, 40960, tied=tied, head_dim=128, attention_bias=False, rope_scaling=None)


PUBLISHED: dict[str, Config] = {
    "llama2-7b": llama((32000, 4096, 32, 32, 32, 11008), max_position_embeddings=4096),
    "llama2-13b": llama((32000, 5120, 40, 40, 40, 13824), max_position_embeddings=4096),
    "llama2-70b": llama((32000, 8192, 80, 64, 8, 28672), max_position_embeddings=4096),
    "llama3-8b": llama3((128256, 4096, 32, 32, 8, 14336), None, positions=8192),
    "llama3-70b": llama3((128256, 8192, 80, 64, 8, 28672), None, positions=8192),
    "llama3.1-8b": llama3((128256, 4096, 32, 32, 8, 14336), 8.0),
    "llama3.1-70b": llama3((128256, 8192, 80, 64, 8, 28672), 8.0),
    "llama3.2-1b": llama3((128256, 2048, 16, 32, 8, 8192), 32.0, tie_word_embeddings=True, head_dim=64),
    "llama3.2-3b": llama3((128256, 3072, 28, 24, 8, 8192), 32.0, tie_word_embeddings=True, head_dim=128),
    "qwen2.5-0.5b": qwen("qwen2", (151936, 896, 24, 14, 2, 4864), 32768, tied=True, sliding_window=32768, max_window_layers=24),
    "qwen2.5-7b": qwen("qwen2", (152064, 3584, 28, 28, 4, 18944), 131072, tied=False, sliding_window=131072, max_window_layers=28),
    "qwen3-0.6b": qwen3((151936, 1024, 28, 16, 8, 3072), tied=True),
    "qwen3-1.7b": qwen3((151936, 2048, 28, 16, 8, 6144), tied=True),
    "qwen3-4b": qwen3((151936, 2560, 36, 32, 8, 9728), tied=True),
    "qwen3-8b": qwen3((151936, 4096, 36, 32, 8, 12288), tied=False),
    "qwen3-32b": qwen3((151936, 5120, 64, 64, 8, 25600), tied=False),
    "mistral-7b-v0.3": decoder(
        "mistral", "MistralForCausalLM", (32768, 4096, 32, 32, 8, 14336), rms_norm_eps=1e-5, rope_theta=1000000.0,
        max_position_embeddings=32768, sliding_window=None, tie_word_embeddings=False,
    ),
    "smollm3-3b": decoder(
        "smollm3", "SmolLM3ForCausalLM", (128256, 2048, 36, 16, 4, 11008), rms_norm_eps=1e-6, rope_theta=5000000.0,
        max_position_embeddings=65536, tie_word_embeddings=True, rope_scaling=None, attention_bias=False, mlp_bias=False,
        no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, use_sliding_window=False, sliding_window=None,
    ),
    "glm-4-9b": decoder(
        "glm", "GlmForCausalLM", (151552, 4096, 40, 32, 2, 13696), rms_norm_eps=1.5625e-7, rope_theta=10000.0,
        max_position_embeddings=8192, tie_word_embeddings=False, attention_bias=True, head_dim=128,
        partial_rotary_factor=0.5,
    ),
    "chatglm2-6b": {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "num_layers": 28, "padded_vocab_size": 65024,
        "hidden_size": 4096, "ffn_hidden_size": 13696, "kv_channels": 128, "num_attention_heads": 32, "seq_length": 32768,
        "multi_query_attention": True, "multi_query_group_num": 2, "layernorm_epsilon": 1e-5, "add_qkv_bias": True,
        "add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True, "original_rope": True,
        "tie_word_embeddings": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "apply_residual_connection_post_layernorm": False, "fp32_residual_connection": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_preset_is_what_the_published_config_says(name: str):
    assert model_spec_from_config(PUBLISHED[name], name=name, where="x") == PRESETS[name]


def test_every_preset_has_its_published_config():
    assert set(PUBLISHED) == set(PRESETS) - {"tiny"}  # which is nobody's


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3.1-8b", {"rope_scaling": None}),
        ("qwen3-8b", {"tie_word_embeddings": True}),
        ("glm-4-9b", {"rms_norm_eps": 1e-5}),
        ("smollm3-3b", {"no_rope_layers": [0, 0, 0, 1] * 9}),
        ("llama3.2-1b", {"head_dim": 128}),
    ],
)
def test_another_setting_makes_another_preset(name: str, change: Config):
    """Control: settings that the number of parameters does not show, but for one."""
    spec = model_spec_from_config(PUBLISHED[name] | change, name=name, where="x")
    assert spec != PRESETS[name]
