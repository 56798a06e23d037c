"""What we export is what others load: the same logits from transformers and PEFT alone, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from many import ROOT, run_many
from small import recipe_maker

from trainspec.export import export
from trainspec.recipe import Recipe

LORA = {"kind": "lora", "rank": 4, "alpha": 12.0, "dropout": 0.1, "targets": "all-linear"}
PROGRAMS = ("jaxtrain", "torchtrain")


@dataclass(frozen=True)
class Case:
    variant: str
    method: str
    policy: str

    def __str__(self) -> str:
        return f"{self.variant}-{self.method}-{self.policy}"


CASES = [
    Case("plain", "lora", "fp32"),
    Case("plain", "lora", "fp64"),
    Case("tied", "lora", "fp32"),  # the checkpoint is sharded
    Case("tied", "full", "fp64"),
    Case("bias", "full", "fp32"),
    Case("bias", "lora", "fp64"),
    Case("llama3-rope", "lora", "fp64"),
]
BOUND = {"fp32": 1e-5, "fp64": 1e-12}


def logits(who: str, cases: list[dict], scratch: Path) -> list[np.ndarray]:
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "tests/logits.py", who, str(scratch / "cases.json"), str(scratch / "out.npz")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(scratch / "out.npz") as found:
        return [found[str(i)] for i in range(len(cases))]


@pytest.fixture(scope="module")
def exchanged(model_dirs, tmp_path_factory) -> dict[tuple[str, str, bool], tuple[np.ndarray, np.ndarray]]:
    """(program, case, merged) -> (our logits, those of transformers and PEFT)."""
    root = tmp_path_factory.mktemp("exchange")
    make = recipe_maker(model_dirs, root / "cache")
    found, foreign, keys, ours = {}, [], [], []
    for program in PROGRAMS:
        files, outs = [], []
        for case in CASES:
            recipe = make(
                case.variant,
                method=LORA if case.method == "lora" else {"kind": "full"},
                precision={"policy": case.policy, "reduce": case.policy},
                optimizer={"lr": 2e-2},
            )
            file, out = root / f"{case}.yaml", root / program / str(case)
            file.write_text(recipe.to_yaml())
            files.append(file)
            outs.append(out)
            dtype = {"fp32": "float32", "fp64": "float64"}[case.policy]
            base = str(model_dirs[case.variant])
            if case.method == "lora":
                foreign.append({"model": base, "adapter": str(out / "adapter"), "dtype": dtype})
                keys.append((program, str(case), False))
                foreign.append({"model": str(out / "merged"), "adapter": None, "dtype": dtype})
            else:
                foreign.append({"model": str(out / "model"), "adapter": None, "dtype": dtype})
            keys.append((program, str(case), True))
        argvs = [["train", str(f), "--out", str(o)] for f, o in zip(files, outs, strict=True)]
        for f, o, case in zip(files, outs, CASES, strict=True):
            argvs.append(["export", str(f), "--out", str(o)])
            if case.method == "lora":
                argvs.append(["export", str(f), "--out", str(o), "--merge"])
        for argv, result in zip(argvs, run_many(program, argvs, root / program / "many"), strict=True):
            assert result["code"] == 0, f"{program} {argv}: {result}"
        asked = [{"recipe": str(f), "out": str(o)} for f, o in zip(files, outs, strict=True)]
        ours += logits(program, asked, root / program / "logits")
    mine = {
        (p, str(c)): ours[i * len(CASES) + j] for i, p in enumerate(PROGRAMS) for j, c in enumerate(CASES)
    }
    foreign.append({"model": str(model_dirs["plain"]), "adapter": None, "dtype": "float32"})
    keys.append(("untrained", "plain", False))
    # float64 cases last: their norm and rotary embedding are replaced in that process from then on.
    order = sorted(range(len(keys)), key=lambda i: foreign[i]["dtype"])
    for i, theirs in zip(
        order, logits("transformers", [foreign[i] for i in order], root / "theirs"), strict=True
    ):
        found[keys[i]] = (mine.get(keys[i][:2], theirs), theirs)
    return found


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exports_give_our_logits_in_transformers_and_peft(exchanged, program: str, case: Case):
    for merged in (False, True) if case.method == "lora" else (True,):
        ours, theirs = exchanged[program, str(case), merged]
        assert np.abs(ours).max() > 0.1
        assert np.abs(ours - theirs).max() <= BOUND[case.policy], f"merged={merged}"


def test_the_bound_tells_a_trained_model_from_an_untrained_one(exchanged):
    """Negative control: training moved the logits by far more than any bound, so an ignored adapter would show."""
    trained, base = (
        exchanged["jaxtrain", "plain-lora-fp32", False][0],
        exchanged["untrained", "plain", False][1],
    )
    assert np.abs(trained - base).max() > 1e-2


PEFT_MAKES = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
base, target = sys.argv[1:]
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=3, lora_alpha=9, target_modules=["k_proj", "up_proj"], task_type="CAUSAL_LM"))
for name, weight in model.named_parameters():
    if "lora_B" in name: torch.nn.init.normal_(weight, std=0.1)
model.save_pretrained(target)
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_adapter_made_by_peft_is_the_start_of_a_run(model_dirs, tmp_path: Path, program: str):
    base, adapter = str(model_dirs["plain"]), str(tmp_path / "peft")
    subprocess.run([sys.executable, "-c", PEFT_MAKES, base, adapter], check=True, capture_output=True)
    make: Callable[..., Recipe] = recipe_maker(model_dirs, tmp_path / "cache")
    method = {"kind": "lora", "rank": 3, "alpha": 9.0, "targets": ["k_proj", "up_proj"], "adapter": adapter}
    # One update with a rate of nearly nothing: what is saved is the adapter that came in.
    recipe = make(method=method, optimizer={"lr": 1e-12, "weight_decay": 0.0}, run={"steps": 1})
    file, out = tmp_path / "r.yaml", tmp_path / "out"
    file.write_text(recipe.to_yaml())
    for result in run_many(program, [["train", str(file), "--out", str(out)]], tmp_path / "many"):
        assert result["code"] == 0, result
    [ours] = logits(program, [{"recipe": str(file), "out": str(out)}], tmp_path / "ours")
    [theirs] = logits(
        "transformers", [{"model": base, "adapter": adapter, "dtype": "float32"}], tmp_path / "theirs"
    )
    assert np.abs(ours - theirs).max() <= BOUND["fp32"]
    assert export(recipe, out=out, merge=False).is_dir()
