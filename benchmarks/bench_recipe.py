"""The models, rows and recipes that the benchmarks of speed train."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from turns import Launch

from trainspec.plans.accelerators import accelerators, hides_gpus

ROOT = Path(__file__).parent.parent
HOME = ROOT / "build/bench"
TOKENIZER = ROOT / "build/demo-model"
Sizes = Mapping[str, Any]

_LLAMA3 = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "dtype": "bfloat16",
}  # fmt: skip
MODELS: dict[str, Sizes] = {
    # 28.8 M parameters.
    "28m": {
        "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 16384,
    },
    # 2.80 B parameters: Llama-3-8B with 8 of its 32 layers.
    "8b-widths": {**_LLAMA3, "num_hidden_layers": 8},
    "8b": {**_LLAMA3, "num_hidden_layers": 32},
}  # fmt: skip
TINY: Sizes = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 16384,
}  # fmt: skip
METHODS = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.0, "targets": "all-linear"},
}
PROGRAMS = ("jaxtrain", "torchtrain", "eager", "compiled", "trainer", "trainer-liger")


@dataclass(frozen=True)
class Case:
    """What is trained: a model of `MODELS`, a method of `METHODS`, and the shape of a batch."""

    model: str = "28m"
    method: str = "full"
    policy: str = "fp32"
    sequence_tokens: int = 512
    examples: int = 4
    accumulation: int = 1
    remat: str = "none"
    dropout: float = 0.0
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens per update."""
        return self.examples * self.sequence_tokens

    def tiny(self) -> Case:
        """The same with a model and rows that only show that everything runs."""
        return replace(self, model="tiny", sequence_tokens=64)

    def __str__(self) -> str:
        rows = f"{self.examples} rows of {self.sequence_tokens} in {self.accumulation} part(s)"
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        plan = "".join(f", {key}={value}" for key, value in self.settings)
        return f"{self.model}, {self.method}{dropout}, {self.policy}, {rows}, remat {self.remat}{plan}"

    @property
    def slug(self) -> str:
        """A name for its files."""
        return "".join(c if c.isalnum() else "-" for c in str(self))

    def write(self, *, model: Path | None = None) -> Path:
        """Its recipe, with its model and its rows beside it."""
        method = dict(METHODS[self.method])
        if "dropout" in method:
            method["dropout"] = self.dropout
        plan: dict[str, Any] = {"remat": self.remat}
        plan |= {key.removeprefix("plan."): yaml.safe_load(value) for key, value in self.settings}
        recipe = {
            "model": {"from": str(model or model_directory(sizes_of(self.model)))},
            "method": method,
            "data": {
                "train": str(rows_file()), "task": "text", "tokenizer": str(TOKENIZER), "loss_on": "all",
                "sequence_tokens": self.sequence_tokens, "packing": False, "too_long": "split",
                "cache": str(HOME / "cache"),
            },
            "batch": {"global_examples": self.examples, "accumulation": self.accumulation},
            "precision": {"policy": self.policy},
            "plan": plan,
            "optimizer": {"lr": 1e-4},
            "schedule": {"kind": "constant"},
            "checkpoint": {"every_steps": 100000},
            "run": {"steps": 100000, "eval_every_steps": 100000},
        }  # fmt: skip
        path = HOME / f"{self.slug}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path


def sizes_of(model: str) -> Sizes:
    """The configuration of a model of `MODELS`, or of the tiny one."""
    return TINY if model == "tiny" else MODELS[model]


def model_directory(sizes: Sizes) -> Path:
    """A checkpoint of these sizes with random weights, made once."""
    name = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:12]
    directory = HOME / f"model-{name}"
    if not (directory / "config.json").exists():
        command = [sys.executable, str(Path(__file__).with_name("trainers.py")), "model"]
        subprocess.run([*command, json.dumps(sizes), str(directory)], check=True, capture_output=True)
    return directory


def model_config(sizes: Sizes) -> Path:
    """A directory with no more than the configuration of a Llama of these sizes: enough to compile for."""
    directory = HOME / f"config-{hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:12]}"
    directory.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **sizes}
    config |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def rows_file() -> Path:
    """The demo's text as one document: every row is full and holds one, and attention is causal in all programs."""
    path = HOME / "one-document.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / "configs/data/text-train.txt").read_text(encoding="utf-8")
        path.write_text("\n".join(line for line in text.splitlines() if line) + "\n", encoding="utf-8")
    return path


def launch(program: str, recipe: Path, *, checkout: Path = ROOT) -> Launch:
    """How a program of `PROGRAMS` is started on a recipe, with the code of this checkout or of another."""
    command = [sys.executable, str(Path(__file__).with_name("trainers.py")), program, str(recipe)]
    # By default JAX would leave a quarter of a GPU's memory unused.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} if program == "jaxtrain" else {}
    name = program if checkout == ROOT else f"{program} of {checkout.name}"
    return Launch(name, command, {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", **environment})


def has_gpu() -> bool:
    """Whether the programs will run on a GPU."""
    return any(a.kind == "GPU" for a in accelerators()) and not hides_gpus(os.environ)
