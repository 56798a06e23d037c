"""A complete training set-up of a few kilobytes, generated on the spot: `parity faults` and `parity matrix` need no files.

It has model directories and an adapter for each method (weights, biases and norms all random, so that a forgotten one
shows), a tokenizer trained on the spot, and question-and-answer records of different lengths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trainspec.files.adapters import write_adapter
from trainspec.files.hf import write_model
from trainspec.files.model_config import config_of
from trainspec.init import initial_value
from trainspec.methods import EXAMPLES, LoRA, Method, PrefixTuning, adapter_table
from trainspec.model import ModelSpec
from trainspec.params import FromWeights, Normal, Param, Zeros, param_table
from trainspec.recipe import Recipe
from trainspec.rope import Llama3Scaling

# Sizes that expose mistakes: grouped kv heads, a head size other than embed / heads, a theta other than the usual 10000,
# and square key and value projections, whose transpose has the right shape.
TINY = ModelSpec(
    name="tiny", vocab=320, embed=24, layers=2, heads=4, kv_heads=2, head_dim=12, mlp=40, norm_eps=1e-5,
    rope_theta=50_000.0, rope_scaling=None, max_positions=512, tied_embeddings=False, attention_bias=False,
    mlp_bias=False, init_std=0.15,
)  # fmt: skip
VARIANTS: dict[str, ModelSpec] = {
    "plain": TINY,
    "tied": replace(TINY, tied_embeddings=True),
    "bias": replace(TINY, attention_bias=True, mlp_bias=True),
    "llama3-rope": replace(TINY, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),
    # Divisible by neither two nor four pipeline stages, and enough for two stages of two model chunks each.
    "deep": replace(TINY, layers=5),
}
_GLM = replace(TINY, family="glm", norm_eps=1.5625e-7, attention_bias=True, rotary_share=0.5)
# The same sizes in the families other than Llama. The window is shorter than a record, and of two layers the second does not
# rotate: in a pipeline it is a stage of its own.
FAMILIES: dict[str, ModelSpec] = {
    "qwen2": replace(TINY, family="qwen2", attention_bias=True),
    "qwen3": replace(TINY, family="qwen3"),
    "mistral": replace(TINY, family="mistral", window=8),
    "smollm3": replace(TINY, family="smollm3", unrotated=(1,)),
    "glm": _GLM,
    "chatglm2": replace(_GLM, family="chatglm2", norm_eps=1e-5, rope_theta=1e4),
}
# Every method, and each of its encoders, by name.
METHODS = EXAMPLES
# P-Tuning v2 as published with ChatGLM2: positions from 0, dropout of keys and values, a projection as wide as all layers.
PUBLISHED_PREFIX = PrefixTuning(
    virtual_tokens=3, positions="from_zero", dropout=0.2, projection=True, projected="all_layers"
)
# LoRA of ChatGLM2's fused projection: queries, keys and values have one A.
ONE_A = LoRA(rank=4, alpha=8.0, dropout=0.1, targets=("query_key_value", "dense_4h_to_h"))
# What a family has beside `METHODS`, by its name and that of the method.
OF_FAMILIES: dict[str, dict[str, Method]] = {
    "chatglm2": {"published-prefix": PUBLISHED_PREFIX, "one-a": ONE_A}
}
LORA = LoRA.examples()["lora"]

_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
_SEED = 1


@dataclass(frozen=True)
class TinySetup:
    """The set-up that `write_tiny` wrote under `root`."""

    root: Path

    def adapter(self, method: str, *, model: str = "plain") -> Path:
        """The directory of an adapter to start a method from; none of it is zero, so all of it acts from step 1."""
        return self.root / "adapters" / f"{method}-{(VARIANTS | FAMILIES)[model].layers}"

    def method(self, name: str, *, model: str = "plain") -> dict[str, Any]:
        """The recipe section for a method of `METHODS` or of the model's family, started from its adapter if it has one."""
        method = method_of(model, name)
        start = {} if method.trains_model else {"adapter": str(self.adapter(name, model=model))}
        return method.model_dump(mode="python") | start

    def model(self, variant: str) -> Path:
        """The Hugging Face directory of a variant or a family."""
        return self.root / variant

    def recipe(self, variant: str = "plain", **sections: Mapping[str, Any]) -> Recipe:
        """A small fp64 recipe; arguments replace fields of their sections, `method` the whole section.

        The learning rate of step 1 is not zero, gradients are clipped and weights decay, so every term of an update counts.
        """
        tree: dict[str, Mapping[str, Any]] = {
            "model": {"from": str(self.model(variant))},
            "method": {"kind": "full"},
            "data": {
                "train": str(self.root / "train.jsonl"),
                "sequence_tokens": 40,
                "cache": str(Path("build/cache").absolute()),
            },
            "batch": {"global_examples": 4, "accumulation": 2},
            "precision": {"policy": "fp64"},
            "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "clip_norm": 0.5},
            "schedule": {"kind": "cosine"},
            "checkpoint": {"every_steps": 10**9},
            "run": {"steps": 8, "stop_after_steps": 3, "eval_every_steps": 10**9},
        }
        for section, fields in sections.items():
            tree[section] = fields if section == "method" else {**tree.get(section, {}), **fields}
        return Recipe.model_validate(tree)


def method_of(model: str, name: str) -> Method:
    """The method of that name in `METHODS`, or of the model's family."""
    return METHODS[name] if name in METHODS else OF_FAMILIES[model][name]


def write_tiny(root: Path) -> TinySetup:
    """Write a `TinySetup` under `root`."""
    root.mkdir(parents=True, exist_ok=True)
    records = list(_records())
    (root / "train.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )
    tokenizer = _tokenizer([text for record in records for text in record.values()])
    for variant, spec in (VARIANTS | FAMILIES).items():
        config = config_of(spec) | {
            "dtype": "float32",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        write_model(root / variant, _weights(spec), companions_from=None, config=config)
        tokenizer.save(str(root / variant / "tokenizer.json"))
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        if variant in FAMILIES:  # whose own classes cut text up otherwise
            special["tokenizer_class"] = "PreTrainedTokenizerFast"
        (root / variant / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    tiny = TinySetup(root)
    adapters = [(v, name) for name, m in METHODS.items() if not m.trains_model for v in ("plain", "deep")]
    adapters += [(family, name) for family, some in OF_FAMILIES.items() for name in some]
    for variant, name in adapters:
        spec, method = (VARIANTS | FAMILIES)[variant], method_of(variant, name)
        weights = {p.name: _random(p) for p in adapter_table(spec, method)}
        write_adapter(tiny.adapter(name, model=variant), weights, model=spec, method=method, base=variant)
    return tiny


def _weights(spec: ModelSpec) -> Iterator[tuple[str, NDArray[Any]]]:
    return ((p.name, _random(p)) for p in param_table(spec))


def _random(param: Param) -> NDArray[Any]:
    """The table's initial value, but never constant: zeros and ones would hide what is done with them."""
    if param.role == "norm" or isinstance(
        param.init, FromWeights
    ):  # what is computed from weights is a magnitude
        return np.float32(1.0) + initial_value(replace(param, init=Normal(0.1)), seed=_SEED, dtype="float32")
    init = Normal(0.1) if isinstance(param.init, Zeros) else param.init
    return initial_value(replace(param, init=init), seed=_SEED, dtype="float32")


def _records() -> Iterator[dict[str, str]]:
    """Questions of three lengths with answers of three lengths, so that examples are filled unevenly."""
    for i, first in enumerate(_NUMBERS[:7]):
        for j, second in enumerate(_NUMBERS[:6]):
            question, answer = (
                (f"What is {first} plus {second}?", _NUMBERS[i + j]),
                (f"Is {first} more than {second}?", "yes, it is" if i > j else "no"),
                (f"Count from {first} up, {second} times.", " ".join(_NUMBERS[i : i + j + 1])),
            )[(i + j) % 3]
            yield {"instruction": question, "output": answer}


def _tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of at most 320 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=TINY.vocab,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "Question: \nAnswer:\n"] * 2, trainer)
    # Like Llama's, it prepends the begin token itself.
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer
