"""What we write others load, and what PEFT writes we load: the same logits as transformers and PEFT alone.

Each side is a process of its own, with all its cases.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asked import asked_for
from logits import real_tokens
from many import ROOT
from safetensors.numpy import load_file
from small import CACHE, recipe_maker

from trainspec.files.hf import resolve_model
from trainspec.init import starting_weights
from trainspec.runs.run import resolve
from trainspec.text.store import Tokenizer

PROGRAMS = ("jaxtrain", "torchtrain")
BOUND = {"fp32": 1e-5, "fp64": 1e-12}
DTYPE = {"fp32": "float32", "fp64": "float64"}
LORA = {"kind": "lora", "rank": 4, "alpha": 12.0, "dropout": 0.1, "targets": "all-linear"}
DORA = LORA | {"kind": "dora"}
TEXT = "what is the capital"


@dataclass(frozen=True)
class Written:
    """A run of ours, exported; `merged` where it is a model of its own."""

    variant: str
    policy: str
    method: dict[str, Any] = field(hash=False)
    merged: bool = False

    def __str__(self) -> str:
        words = [
            self.method["kind"],
            self.method.get("encoder"),
            self.method.get("projection") and "projected",
        ]
        return "-".join([self.variant, *filter(None, words), self.policy, *["merged"] * self.merged])


WRITTEN = [
    Written("tied", "fp32", LORA),  # the checkpoint is sharded
    Written("tied", "fp32", LORA, merged=True),
    Written("bias", "fp64", LORA),
    Written("bias", "fp64", LORA, merged=True),
    Written("llama3-rope", "fp64", LORA | {"rslora": True}),
    Written("bias", "fp64", DORA),
    Written("bias", "fp64", DORA, merged=True),
    Written("tied", "fp64", {"kind": "full"}, merged=True),
    Written("qwen3", "fp64", {"kind": "full"}, merged=True),
    Written("qwen3", "fp64", LORA),
    Written("qwen2", "fp64", LORA, merged=True),
    Written("mistral", "fp64", {"kind": "full"}, merged=True),
    Written("mistral", "fp64", {"kind": "prefix", "virtual_tokens": 5}),
    Written("mistral", "fp64", {"kind": "prompt", "virtual_tokens": 5}),
    Written("smollm3", "fp64", LORA, merged=True),
    Written("smollm3", "fp64", {"kind": "prefix", "virtual_tokens": 5}),
    Written("glm", "fp64", {"kind": "full"}, merged=True),
    Written("glm", "fp64", LORA),
    Written("glm", "fp64", {"kind": "prefix", "virtual_tokens": 5}),
    Written("yarn-rope", "fp64", LORA),
    Written("tied", "fp64", {"kind": "prompt", "virtual_tokens": 5}),
    Written("plain", "fp32", {"kind": "ptuning", "virtual_tokens": 5, "encoder": "lstm", "hidden": 20}),
    Written("bias", "fp64", {"kind": "ptuning", "virtual_tokens": 5, "encoder": "mlp", "hidden": 20}),
    Written("llama3-rope", "fp64", {"kind": "prefix", "virtual_tokens": 5}),
    Written("plain", "fp32", {"kind": "prefix", "virtual_tokens": 5, "projection": True, "hidden": 20}),
]
# Of the fast tests: an adapter and a whole model.
FAST = [WRITTEN[i] for i in (0, 8)]
# PEFT's settings, none of them the default, and the method that goes on from what PEFT then saves.
MADE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": (
        "LoraConfig",
        {"r": 3, "lora_alpha": 9, "target_modules": "all-linear"},
        {"kind": "lora", "rank": 3, "alpha": 9.0, "targets": "all-linear"},
    ),
    "rslora": (
        "LoraConfig",
        {"r": 3, "lora_alpha": 5, "target_modules": ["k_proj", "up_proj"], "use_rslora": True},
        {"kind": "lora", "rank": 3, "alpha": 5.0, "targets": ["k_proj", "up_proj"], "rslora": True},
    ),
    "dora": (
        "LoraConfig",
        {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "o_proj", "down_proj"], "use_dora": True},
        {"kind": "dora", "rank": 3, "alpha": 9.0, "targets": ["q_proj", "o_proj", "down_proj"]},
    ),
    "prefix": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 6},
        {"kind": "prefix", "virtual_tokens": 6},
    ),
    "projected": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 7, "prefix_projection": True, "encoder_hidden_size": 20},
        {"kind": "prefix", "virtual_tokens": 7},
    ),
    "prompt": (
        "PromptTuningConfig",
        {"num_virtual_tokens": 9, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT},
        {"kind": "prompt", "virtual_tokens": 9},
    ),
    "lstm": (
        "PromptEncoderConfig",
        {"num_virtual_tokens": 5, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 20},
        {"kind": "prompt", "virtual_tokens": 5},
    ),
    "mlp": (
        "PromptEncoderConfig",
        {"num_virtual_tokens": 5, "encoder_hidden_size": 20},
        {"kind": "prompt", "virtual_tokens": 5},
    ),
}
MAKE = """
import json, sys, peft, torch
from transformers import AutoModelForCausalLM
base, target, made = sys.argv[1:]
for name, (config, settings, _) in json.loads(made).items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if settings.get("prompt_tuning_init") == "TEXT":
        settings["tokenizer_name_or_path"] = base
    model = peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **settings))
    for leaf, weight in model.named_parameters():
        if "lora_B" in leaf: torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(f"{target}/{name}")
"""
READ = [
    (name, policy, padding)
    for name in MADE
    for policy, padding in (("fp32", "right"), ("fp32", "left"), ("fp64", "left"))
]


def logits(
    who: str, cases: list[dict[str, Any]], scratch: Path, *, first: list[list[str]] | None = None
) -> list[np.ndarray]:
    """The logits of the cases, after the command lines that come `first`."""
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "cases.json").write_text(json.dumps(cases))
    (scratch / "first.json").write_text(json.dumps(first or []))
    files = [str(scratch / name) for name in ("cases.json", "out.npz", "first.json")]
    command = [sys.executable, "tests/logits.py", who, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(scratch / "out.npz") as found:
        return [found[str(i)] for i in range(len(cases))]


def _theirs(cases: list[dict[str, Any]], scratch: Path) -> list[np.ndarray]:
    """In float64 cases last: transformers' norm and rotary embedding are replaced in that process from then on."""
    order = sorted(range(len(cases)), key=lambda i: cases[i]["dtype"])
    found = logits("transformers", [cases[i] for i in order], scratch)
    return [found[order.index(i)] for i in range(len(cases))]


@dataclass(frozen=True)
class Exchanged:
    """Logits by (program, case): of ours, and for the same case of transformers and PEFT."""

    ours: dict[tuple[str, str], np.ndarray]
    theirs: dict[tuple[str, str], np.ndarray]
    adapters: Path


@pytest.fixture(scope="module")
def exchanged(
    model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Exchanged:
    written = [WRITTEN[0], *(case for case in asked_for(request, "case") if case != WRITTEN[0])]
    # Each is compared with another one, too.
    read = [
        c for c in READ if c[1:] in {asked[1:] for asked in asked_for(request, "name", "policy", "padding")}
    ]
    root = tmp_path_factory.mktemp("exchange")
    make = recipe_maker(model_dirs)
    adapters = root / "made"
    subprocess.run(
        [sys.executable, "-c", MAKE, str(model_dirs["plain"]), str(adapters), json.dumps(MADE)], check=True
    )
    ours, foreign = {}, {}
    text_tokens = _text_tokens(make)

    def recipe_file(name: str, variant: str, policy: str, method: dict[str, Any]) -> str:
        precision, file = {"policy": policy, "reduce": policy}, root / f"{name}.yaml"
        recipe = make(variant, method=method, precision=precision, optimizer={"lr": 2e-2})
        file.write_text(recipe.to_yaml())
        return str(file)

    for program in PROGRAMS:
        asked, argvs = {}, []
        for case in written:
            file = recipe_file(str(case), case.variant, case.policy, case.method)
            out = root / program / str(case)
            argvs += [["train", file, "--out", str(out)]]
            # The base is float32, and a merged model would be stored as it is.
            merge = (
                ["--merge", "--dtype", DTYPE[case.policy]]
                if case.merged and case.method["kind"] != "full"
                else []
            )
            argvs += [["export", file, "--out", str(out), *merge]]
            asked[str(case)] = {"recipe": file, "out": str(out)}
            base, dtype = str(model_dirs[case.variant]), DTYPE[case.policy]
            loaded = {"model": base, "adapter": str(out / "adapter")}
            if case.merged:
                folder = "model" if case.method["kind"] == "full" else "merged"
                loaded = {"model": str(out / folder), "adapter": None}
            foreign[program, str(case)] = loaded | {"dtype": dtype}
        for name, policy, padding in read:
            case, method = f"{name}-{policy}-{padding}", MADE[name][2] | {"adapter": str(adapters / name)}
            asked[case] = {
                "recipe": recipe_file(case, "plain", policy, method),
                "out": None,
                "padding": padding,
            }
            made = {"model": str(model_dirs["plain"]), "adapter": str(adapters / name)}
            foreign[program, case] = made | {"dtype": DTYPE[policy], "padding": padding}
        from_text = {"kind": "prefix", "virtual_tokens": len(text_tokens), "init": "text", "text": TEXT}
        asked["from-text"] = {"recipe": recipe_file("from-text", "bias", "fp32", from_text), "out": None}
        bare = {"model": str(model_dirs["bias"]), "adapter": None, "dtype": "float32"}
        foreign[program, "from-text"] = bare | {"after": text_tokens}
        found = logits(program, list(asked.values()), root / program / "logits", first=argvs)
        ours |= {(program, case): array for case, array in zip(asked, found, strict=True)}
    foreign["untrained", "tied"] = {"model": str(model_dirs["tied"]), "adapter": None, "dtype": "float32"}
    unlike = dict.fromkeys(json.dumps(case, sort_keys=True) for case in foreign.values())
    found = _theirs([json.loads(case) for case in unlike], root / "theirs")
    by_case = dict(zip(unlike, found, strict=True))
    theirs = {key: by_case[json.dumps(case, sort_keys=True)] for key, case in foreign.items()}
    return Exchanged(ours, theirs, adapters)


def _text_tokens(make) -> list[int]:
    directory = resolve_model(make().model)[1]
    assert directory is not None
    return Tokenizer(directory, None, "2024-07-26").encode(TEXT, CACHE)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=str(c), marks=[] if c in FAST else pytest.mark.full(minutes=3)) for c in WRITTEN],
)
def test_exports_give_our_logits_in_transformers_and_peft(exchanged: Exchanged, program: str, case: Written):
    ours, theirs = exchanged.ours[program, str(case)], exchanged.theirs[program, str(case)]
    assert np.abs(ours).max() > 0.1
    assert np.abs(ours - theirs).max() <= BOUND[case.policy]


def test_the_bound_tells_a_trained_model_from_an_untrained_one(exchanged: Exchanged):
    """Negative control: training moved the logits by far more than any bound, so an ignored adapter would show."""
    trained, base = exchanged.ours["jaxtrain", str(WRITTEN[0])], exchanged.theirs["untrained", "tied"]
    assert np.abs(trained - base).max() > 1e-2


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("name", "policy", "padding"),
    [pytest.param(*c, marks=() if c[1:] == ("fp32", "left") else pytest.mark.full(minutes=3)) for c in READ],
)
def test_adapters_that_peft_made_give_its_logits(exchanged: Exchanged, program, name, policy, padding):
    ours, theirs = (
        side[program, f"{name}-{policy}-{padding}"] for side in (exchanged.ours, exchanged.theirs)
    )
    real = real_tokens(padding).astype(bool)
    bound = 1e-9 if policy == "fp64" else BOUND[policy]
    assert np.abs(ours - theirs)[real].max() <= bound
    # Negative control: another adapter of the same model is far away.
    other = exchanged.theirs[program, f"{'mlp' if name != 'mlp' else 'lstm'}-{policy}-{padding}"]
    assert np.abs(ours - other)[real].max() > 1e-2


@pytest.mark.parametrize("program", PROGRAMS)
def test_behind_a_prefix_of_a_text_the_model_goes_on_as_behind_the_text(exchanged: Exchanged, program: str):
    ours, theirs = exchanged.ours[program, "from-text"], exchanged.theirs[program, "from-text"]
    assert np.abs(ours - theirs).max() <= BOUND["fp32"]


def test_a_prompt_starts_as_pefts_of_the_same_text(exchanged: Exchanged, model_dirs, tmp_path: Path):
    method = {"kind": "prompt", "virtual_tokens": 9, "init": "text", "text": TEXT}
    recipe = recipe_maker(model_dirs)(method=method)
    started = {p.name: w[...] for p, w in starting_weights(resolve(recipe))}
    theirs = load_file(exchanged.adapters / "prompt/adapter_model.safetensors")["prompt_embeddings"]
    assert np.array_equal(started["prompt_encoder.embedding.weight"], theirs)
