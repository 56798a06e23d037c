"""What a damaged case is made from, and what it is."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from small import write_checkpoint, write_tokenizer

from trainspec.families import PRESETS
from trainspec.files.adapters import write_adapter
from trainspec.methods import LoRA, Method, PrefixTuning, PromptTuning, adapter_table

Tree = dict[str, Any]
MODEL = replace(PRESETS["tiny"], vocab=320, embed=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=24)
ADAPTERS: dict[str, Method] = {
    "lora": LoRA(rank=1, alpha=8.0),
    "prefix": PrefixTuning(virtual_tokens=3),
    "prompt": PromptTuning(virtual_tokens=3),
}
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Whole:
    """What is undamaged: a model with its tokenizer, one that has a chat template, and adapters."""

    model: Path
    chat: Path
    adapters: Path


@dataclass(frozen=True)
class Case:
    """A command line, and what a judge compares: files with the settings in them that are taken or refused.

    `tokenizer` is a directory whose ids of `records` have to be transformers' own, with `template` where that is given;
    `config` a config.json, `adapter` the name of one of ADAPTERS and its adapter_config.json; `source` is a file of records.
    """

    argv: list[str]
    tokenizer: Path | None = None
    template: Path | None = None
    records: Path | None = None
    config: Path | None = None
    adapter: tuple[str, Path] | None = None
    source: Path | None = None


def write_whole(root: Path) -> Whole:
    """A model of a few thousand weights in shards, a copy of its tokenizer with a chat template, and adapters."""
    model = write_checkpoint(root / "model", MODEL, shard_bytes=16_000)
    chat = root / "chat"
    chat.mkdir()
    write_tokenizer(chat)
    config = json.loads((chat / "tokenizer_config.json").read_text())
    (chat / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    for name, method in ADAPTERS.items():
        weights = {p.name: np.ones(p.shape, np.float32) for p in adapter_table(MODEL, method)}
        write_adapter(root / "adapters" / name, weights, model=MODEL, method=method, base=str(model))
    return Whole(model, chat, root / "adapters")


def linked(source: Path, target: Path, *but: str) -> Path:
    """A directory with links to the files of another, but for some."""
    target.mkdir()
    for path in source.iterdir():
        if path.name not in but:
            (target / path.name).symlink_to(path)
    return target
