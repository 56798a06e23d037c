"""Files of a model and of an adapter: config.json, the index and the headers of weights, adapter_config.json."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import yaml

from damage.case import ADAPTERS, Case, Tree, Whole, linked
from damage.recipes import recipe_tree
from damage.values import damage_values, json_text, written

CONFIG_KEYS = (
    "architectures", "model_type", "head_dim", "rope_scaling", "rope_parameters", "rope_theta", "quantization_config",
    "tie_word_embeddings", "attention_bias", "partial_rotary_factor", "original_max_position_embeddings", "auto_map",
    "is_causal", "attention_dropout", "pad_token_id", "hidden_act", "mlp_bias", "max_position_embeddings",
)  # fmt: skip
ROPES: tuple[Any, ...] = (
    None,
    {"rope_type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
)  # fmt: skip
ADAPTER_KEYS = (
    "use_dora", "bias", "modules_to_save", "rank_pattern", "use_rslora", "init_lora_weights", "layer_replication",
    "fan_in_fan_out", "num_layers", "num_attention_heads", "peft_type", "r", "lora_alpha",
)  # fmt: skip
INDEX = "model.safetensors.index.json"


def damage_config(folder: Path, rng: random.Random, whole: Whole) -> Case:
    """config.json."""
    model = linked(whole.model, folder / "model", "config.json")
    config = json.loads((whole.model / "config.json").read_text())
    if rng.random() < 0.4:
        config[rng.choice(("rope_scaling", "rope_parameters"))] = rng.choice(ROPES)
    text = json_text(damage_values(config, rng, keys=CONFIG_KEYS), rng)
    (model / "config.json").write_bytes(written(text, rng))
    return Case(_shown(folder, rng, whole, model), config=model / "config.json")


def damage_weights(folder: Path, rng: random.Random, whole: Whole) -> Case:
    """The index of the weights, and the headers of their files."""
    index = json.loads((whole.model / INDEX).read_text())
    if rng.random() < 0.4:
        model = linked(whole.model, folder / "model", INDEX)
        (model / INDEX).write_bytes(written(json_text(damage_values(index, rng), rng), rng))
    else:
        shard = rng.choice(sorted(set(index["weight_map"].values())))
        model = linked(whole.model, folder / "model", shard)
        (model / shard).write_bytes(_damage_safetensors((whole.model / shard).read_bytes(), rng))
    return Case(_shown(folder, rng, whole, model))


def _damage_safetensors(content: bytes, rng: random.Random) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    head, tensors = json.loads(content[8 : 8 + size]), content[8 + size :]
    match rng.randrange(4):
        case 0:
            size = rng.choice((0, 1, size - 1, size + 8, 2**31, 2**63, len(content)))
            return struct.pack("<Q", size) + content[8:]
        case 1:
            return content[: rng.randrange(len(content))]
        case _:
            text = written(json_text(damage_values(head, rng, keys=("__metadata__",)), rng), rng)
            return struct.pack("<Q", len(text)) + text + tensors


def damage_adapter(folder: Path, rng: random.Random, whole: Whole) -> Case:
    """adapter_config.json."""
    name = rng.choice(sorted(ADAPTERS))
    config = json.loads((whole.adapters / name / "adapter_config.json").read_text())
    adapter = linked(whole.adapters / name, folder / "adapter", "adapter_config.json")
    file = adapter / "adapter_config.json"
    file.write_bytes(written(json_text(damage_values(config, rng, keys=ADAPTER_KEYS), rng), rng))
    method = ADAPTERS[name].model_dump(mode="json") | {"adapter": str(adapter)}
    return Case(_shown(folder, rng, whole, whole.model, method=method), adapter=(name, file))


def _shown(folder: Path, rng: random.Random, whole: Whole, model: Path, **sections: Tree) -> list[str]:
    tree = recipe_tree(whole, rng) | {"model": {"from": str(model)}} | sections
    (folder / "r.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return ["show", str(folder / "r.yaml")]
