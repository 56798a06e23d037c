"""Small directories of different shapes and families, made by transformers' own `save_pretrained` and a few edits.

Nothing of ours makes the models: what reads them can be judged by transformers alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small import write_tokenizer
from transformers import (
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"rms_norm_eps": 1e-6}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"rms_norm_eps": 1e-6}),
    "mistral": (MistralForCausalLM, MistralConfig, {}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {"rms_norm_eps": 1e-6}),
    "glm": (GlmForCausalLM, GlmConfig, {"rms_norm_eps": 1.5625e-7}),
}
# Those whose head is the embedding.
TIED = ("tied", "smollm3", "qwen3-tied-yarn")
SHAPES = (
    "tied",
    "untied",
    "own-head",
    "sharded",
    "stale-index",
    "bf16",
    "yarn",
    *FAMILIES,
    "qwen3-tied-yarn",
    "glm-linear",
)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def small_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> LlamaForCausalLM:
    """Random weights, biases and norms too; `changes` are those of its LlamaConfig."""
    return _drawn(LlamaForCausalLM, LlamaConfig, seed, changes).to(dtype)


def small_qwen3(*, seed: int = 0, **changes: object) -> Qwen3ForCausalLM:
    """The same as a Qwen3; `changes` are those of its Qwen3Config."""
    return small_model("qwen3", seed=seed, **changes)


def small_model(family: str, *, seed: int = 0, **changes: object):
    """The same as a model of another family, a key of FAMILIES."""
    model_class, config_class, usual = FAMILIES[family]
    return _drawn(model_class, config_class, seed, usual | changes)


def _drawn(model_class, config_class, seed: int, changes: dict[str, object]):
    sizes: dict[str, object] = {
        "vocab_size": 323,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**(sizes | changes)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_((1.0 if "norm" in name else 0.0) + 0.15 * torch.randn(weight.shape))
    return model


def make_model_shapes(root: Path) -> dict[str, Path]:
    """The directories by name (SHAPES), each with the tokenizer of `write_tokenizer`."""
    paths = {name: root / name for name in SHAPES}
    small_llama(seed=1, tie_word_embeddings=True).save_pretrained(paths["tied"])
    small_llama(seed=2, attention_bias=True, mlp_bias=True).save_pretrained(paths["untied"])
    small_llama(seed=3).save_pretrained(paths["own-head"])
    edit_config(paths["own-head"], tie_word_embeddings=True)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}
    small_llama(seed=4, rope_parameters=rope, num_key_value_heads=4).save_pretrained(
        paths["sharded"], max_shard_size="40KB"
    )
    # Shards and index of an older model stayed behind beside the newer one's single file.
    small_llama(seed=5).save_pretrained(paths["stale-index"], max_shard_size="40KB")
    save_file(
        small_llama(seed=6).state_dict(),
        paths["stale-index"] / "model.safetensors",
        metadata={"format": "pt"},
    )
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    small_llama(seed=7, rope_parameters=llama3, dtype=torch.bfloat16).save_pretrained(paths["bf16"])
    rope = {"rope_type": "default", "rope_theta": 1e6}
    small_qwen3(seed=8, rope_parameters=rope, attention_bias=True).save_pretrained(paths["qwen3"])
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    small_llama(seed=9, rope_parameters=yarn, num_key_value_heads=1).save_pretrained(paths["yarn"])
    # Odd vocabularies; one, two and all kv heads; a window that is shorter than every row; a layer of five that does
    # not rotate: without a bias of keys, which would add the same to all scores of a query there, so that its gradient
    # is nothing but rounding.
    small_model(
        "qwen2", seed=10, vocab_size=331, num_key_value_heads=1, rope_parameters=rope
    ).save_pretrained(paths["qwen2"])
    small_model("mistral", seed=11, num_key_value_heads=4, sliding_window=37).save_pretrained(
        paths["mistral"]
    )
    small_model("smollm3", seed=12, vocab_size=321, num_hidden_layers=5, mlp_bias=True).save_pretrained(
        paths["smollm3"]
    )
    small_model("glm", seed=13, vocab_size=333, num_key_value_heads=1).save_pretrained(paths["glm"])
    small_model(
        "qwen3", seed=14, tie_word_embeddings=True, num_key_value_heads=4, rope_parameters=yarn
    ).save_pretrained(paths["qwen3-tied-yarn"])
    half = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    small_model("glm", seed=15, num_key_value_heads=2, rope_parameters=half).save_pretrained(
        paths["glm-linear"]
    )
    for path in paths.values():
        write_tokenizer(path)
    return paths


def edit_config(directory: Path, **changes: object) -> None:
    """Set keys of a directory's `config.json`; None is written as null."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=1))


def edit_weights(directory: Path, *, remove: tuple[str, ...] = (), **tensors: torch.Tensor) -> None:
    """Take tensors out of `model.safetensors` and put others in, named with `__` for the dots."""
    file = directory / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if name not in remove}
    added = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(kept | added, file, metadata={"format": "pt"})


if __name__ == "__main__":
    for name, path in make_model_shapes(Path(sys.argv[1])).items():
        print(name, path)
