"""Recipes and `--set`: values of a wrong type at every key, and text that is hardly YAML any more."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import yaml
from small import ROOT

from damage.case import Case, Tree, Whole
from damage.values import ODD, damage_text, damage_values, near, written
from trainspec.methods import EXAMPLES
from trainspec.recipe import recipe_from

TRAIN = str(ROOT / "configs/data/qa-heldout.jsonl")
# Every method's examples, and settings that these leave at their defaults.
METHODS: tuple[Tree, ...] = (
    *(spec.model_dump(mode="json") for spec in EXAMPLES.values()),
    {"kind": "lora", "rslora": True, "dropout": 0.1, "targets": ["q_proj", "v_proj"], "adapter": None},
    {"kind": "prompt", "virtual_tokens": 3, "init": "text", "text": "Name a fruit."},
)
PLANS: tuple[Tree, ...] = (
    {"plan": {}},
    {"plan": {"data": 2, "fsdp": 2, "shards": "params"}, "precision": {"policy": "bf16", "reduce": "fp32"}},
    {"plan": {"pipe": 2, "microbatches": 2, "schedule": "gpipe"}},
    {"run": {"epochs": 1.5, "steps": None}, "schedule": {"kind": "cosine", "warmup_ratio": 0.1}},
)
YAML_WORDS = (
    "null", "true", "false", "0", "1", "2", "8", "-1", "0.5", "1.0", "2e-4", "0x10", "[q_proj]", "cosine", "left", "bf16", "1e400", ".inf", ".nan", "[]", "{}", "[1, 2]", "{a: b}", "'x'", '"\\ud800"', '"\\0"',
    "&a", "*a", "&a [*a]", "!!int x", "!!map [1]", "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!python/name:os.system x",
    "!!timestamp 2024-13-01", "2024-07-26", "2024-07-26 10:00:00", "tomorrow", "preset:tiny", "hub:", ":", "- ", "%", "@",
    "? ", "<<: *a", "<<: {lr: 1}", "9" * 30, "9" * 5000, "0x" + "f" * 5000, "1:30:00", "0o17", "1_000", "yes", "~", "lora",
    "full", "prefix", "interleaved", "epochs: 2", "steps: null", "|\n x", "---", "...", "[" * 2000, "{" * 500, "x" * 4000,
)  # fmt: skip


def recipe_tree(whole: Whole, rng: random.Random, **data: Any) -> Tree:
    """A recipe that can be run."""
    tree: Tree = {
        "model": {"from": str(whole.model)},
        "method": dict(rng.choice(METHODS)),
        "data": {"train": TRAIN, "sequence_tokens": 64, "cache": "cache", "too_long": "cut"} | data,
        "batch": {"global_examples": 8, "accumulation": 2},
        "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95], "clip_norm": 1.0},
        "schedule": {"kind": "linear", "warmup_steps": 2},
        "run": {"steps": 3},
    }
    return tree | copy.deepcopy(rng.choice(PLANS))


def damage_recipe(folder: Path, rng: random.Random, whole: Whole) -> Case:
    """Values of a wrong type at every key, unknown keys, and text that is hardly YAML any more."""
    tree = recipe_tree(whole, rng)
    if rng.random() < 0.5:
        tree = recipe_from(tree).model_dump(mode="json", by_alias=True)  # with every default written out
    if rng.random() < 0.6:
        tree = damage_values(tree, rng, keys=("columns", "epochs", "warmup_ratio", "text", "ignore", "data"))
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.3)
    else:
        text = damage_text(yaml.safe_dump(tree, sort_keys=False), rng, YAML_WORDS)
    (folder / "r.yaml").write_bytes(written(text, rng))
    return Case(["data" if rng.random() < 0.2 else "show", str(folder / "r.yaml")])


def damage_override(folder: Path, rng: random.Random, whole: Whole) -> Case:
    """`--set` of every key, to every kind of YAML."""
    tree = recipe_tree(whole, rng)
    (folder / "r.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    resolved = recipe_from(tree).model_dump(mode="json", by_alias=True)
    keys = [f"{section}.{key}" for section, fields in resolved.items() for key in fields]
    words = (*YAML_WORDS, *(json.dumps(value) for value in ODD), "\ud800", "\udcff", "a\0b", "")
    overrides = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        key, word = rng.choice((*keys, *keys, *keys, *resolved)), rng.choice(words)
        if "." in key and rng.random() < 0.4:
            section, leaf = key.split(".")
            word = json.dumps(near(resolved[section][leaf], rng))
        if rng.random() < 0.1:
            key = rng.choice((key + ".x", key + "x", "." + key, key.upper(), "", "x" * 3000, "\ud800", "\0"))
        overrides += ["--set", key + word if rng.random() < 0.02 else f"{key}={word}"]
    return Case(["show", str(folder / "r.yaml"), *overrides])
