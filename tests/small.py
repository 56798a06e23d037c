"""Small real inputs, made once per session with numpy and the tokenizers library: no framework needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trainspec.families import PRESETS
from trainspec.files.hf import write_model
from trainspec.files.model_config import config_of
from trainspec.init import initial_value
from trainspec.model import ModelSpec
from trainspec.params import Normal, Param, param_table
from trainspec.recipe import Recipe
from trainspec.rope import LinearScaling, Llama3Scaling, YarnScaling

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "configs/data/text-train.txt"
QA = ROOT / "configs/data/qa-train.jsonl"

# Keyed by content, so all tests share it: what one has tokenised no other has to.
CACHE = ROOT / "build/test-cache"

# Grouped kv heads, and head_dim is not embed / heads.
SMALL = replace(
    PRESETS["tiny"],
    name="small",
    vocab=320,
    embed=32,
    heads=4,
    kv_heads=2,
    head_dim=12,
    mlp=48,
    init_std=0.15,
)
VARIANTS: dict[str, ModelSpec] = {
    "plain": SMALL,
    "tied": replace(SMALL, tied_embeddings=True),
    "bias": replace(SMALL, attention_bias=True, mlp_bias=True),
    "linear-rope": replace(SMALL, rope_scaling=LinearScaling(4.0)),
    "llama3-rope": replace(SMALL, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64), max_positions=512),
    "yarn-rope": replace(SMALL, rope_scaling=YarnScaling(4.0, 128, 32.0, 1.0, 1.1, True), max_positions=512),
    "qwen3": replace(SMALL, family="qwen3", norm_eps=1e-6, rope_theta=1e6, tied_embeddings=True),
    "qwen2": replace(SMALL, family="qwen2", kv_heads=4, norm_eps=1e-6, rope_theta=1e6, attention_bias=True),
    # The window is smaller than any record.
    "mistral": replace(SMALL, family="mistral", window=16),
    "smollm3": replace(SMALL, family="smollm3", norm_eps=1e-6, unrotated=(1,), tied_embeddings=True),
    "glm": replace(SMALL, family="glm", norm_eps=1.5625e-7, attention_bias=True, rotary_share=0.5),
    # Its directory has the published layout.
    "chatglm2": replace(SMALL, family="chatglm2", attention_bias=True, rotary_share=0.5, rope_theta=1e4),
}
# The families other than Llama, each with its variant's name.
FAMILIES = ("qwen3", "qwen2", "mistral", "smollm3", "glm", "chatglm2")


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of 320 tokens, trained on the shipped text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(TEXT)], trainer)
    # Like Llama's, it puts the begin token in front by itself.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(special | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )


def write_checkpoint(
    directory: Path, spec: ModelSpec, *, seed: int = 1, shard_bytes: int = 4 * 2**30
) -> Path:
    """A Hugging Face directory of `spec` with random weights (biases too) and a tokenizer."""
    weights = ((p.name, _drawn(p, seed)) for p in param_table(spec))
    config = config_of(spec) | {"dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_model(directory, weights, companions_from=None, config=config, shard_bytes=shard_bytes)
    write_tokenizer(directory)
    return directory


def _drawn(param: Param, seed: int) -> NDArray[Any]:
    """As the table says, but for biases and norms of heads, which get values so that a forgotten one shows."""
    is_head_norm = "head_dim" in param.axes
    drawn = replace(param, init=Normal(0.1)) if is_head_norm or param.name.endswith("bias") else param
    value = initial_value(drawn, seed=seed, dtype="float32")
    return value + np.float32(1) if is_head_norm else value


def recipe_maker(model_dirs: dict[str, Path]) -> Callable[..., Recipe]:
    """Makes small recipes; arguments replace whole sections' fields, `method` the whole section."""

    def make(variant: str = "plain", **sections: dict[str, Any]) -> Recipe:
        tree: dict[str, Any] = {
            "model": {"from": str(model_dirs[variant])},
            "method": {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
            "data": {"train": str(QA), "sequence_tokens": 160, "cache": str(CACHE)},
            "batch": {"global_examples": 4, "accumulation": 1},
            "optimizer": {"lr": 1e-3},
            "schedule": {"kind": "constant"},
            "run": {"steps": 3, "eval_every_steps": 1000},
        }
        for section, fields in sections.items():
            tree[section] = fields if section == "method" else tree.get(section, {}) | fields
        return Recipe.model_validate(tree)

    return make
