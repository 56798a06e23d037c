"""What `--help` and a refusal load: nothing that takes long. Times are not looked at, a machine may be busy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from small import ROOT

FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "torch", "deepspeed", "peft", "transformers"}
# Of what `--help` does without. A refusal needs numpy and pydantic; parity also knows how to write a page.
HEAVY = {
    *FRAMEWORKS,
    "sacrebleu",
    "rouge_score",
    "nltk",
    "jieba",
    "pydantic",
    "yaml",
    "safetensors",
    "tokenizers",
    "jinja2",
    "tensorboard",
    "tqdm",
}
DEMO = "configs/demo.yaml"
REFUSALS = {
    "trainspec": (
        ["show", DEMO, "--set", "method.rnk=4"],
        ["data", DEMO, "--set", "data.train=nothing.jsonl"],
        ["checkpoint", "show", "nowhere"],
        ["checkpoint", "convert", "nowhere", "out", "--to", "native"],
    ),
    "parity": (["check", DEMO, "--set", "method.rnk=4"], ["check", DEMO, "--steps", "1000"]),
    "jaxtrain": (
        ["train", DEMO, "--set", "method.rnk=4"],
        ["train", DEMO, "--set", "plan.tensor=3"],
        ["train", DEMO, "--set", "data.train=nothing.jsonl"],
        ["train", DEMO, "--set", "data.tokenizer=configs"],
        ["train", DEMO, "--trace", "configs"],
        ["eval", DEMO, "--set", "model.from=nowhere"],
        ["eval", DEMO, "--set", "data.heldout=null"],
        ["eval", DEMO, "--set", "data.heldout=nothing.jsonl"],
        ["eval", DEMO, "--out", "nowhere"],
        ["generate", DEMO, "--prompt", "Why?", "--set", "model.from=nowhere"],
        ["generate", DEMO, "--prompt", "Why?", "--out", "nowhere"],
    ),
}
REFUSALS["torchtrain"] = REFUSALS["jaxtrain"]

# Prints what is loaded after each command line, and how it ended.
PROBE = """
import contextlib, importlib, io, json, sys
program, heavy, lines = json.load(sys.stdin)
def ended(argv):
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            code = importlib.import_module(program + ".cli").main(argv)
        except SystemExit as error:
            code = error.code
    return [code, told.getvalue(), sorted(set(heavy) & set(sys.modules))]
print(json.dumps([ended(argv) for argv in lines]))
"""


def probed(program: str, *lines: list[str]) -> list[tuple[int, str, list[str]]]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input=json.dumps([program, sorted(HEAVY), lines]),
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("program", REFUSALS)
def test_nothing_heavy_is_loaded_for_help_or_a_refusal(program: str):
    (code, told, loaded), *refused = probed(program, ["--help"], *REFUSALS[program])
    assert (code, loaded) == (0, [])
    assert told.startswith(f"usage: {program}")
    for argv, (code, told, loaded) in zip(REFUSALS[program], refused, strict=True):
        assert (code, told.count("\n")) == (2, 1), (argv, told)
        assert not FRAMEWORKS & set(loaded), (argv, loaded)
        assert "tensorboard" not in loaded or program == "parity", argv
    assert "pydantic" in refused[0][2]  # control: the probe sees what is loaded


WRONG_WORDS = {
    "trainspec": {
        ("checkpoint", "show"): "the following arguments are required: DIR",
        ("nonsense",): "argument COMMAND: invalid choice: 'nonsense'",
        ("data", DEMO, "--rows", "x"): "argument --rows: invalid int value: 'x'",
        ("data", DEMO, "-rows", "2"): "unrecognised option -rows; did you mean '--rows'?",
        (
            "checkpoint",
            "show",
            "--jsn",
            "runs/demo",
        ): "did you mean '--json'?; see trainspec checkpoint show --help",
    },
    "parity": {
        (
            "check",
            DEMO,
            "--stepz",
            "1",
        ): "unrecognised option --stepz; did you mean '--steps'?; see parity check --help",
        ("check", "--stepz", "1"): "did you mean '--steps'?",
        (
            "generate",
            DEMO,
            "--form=runs/demo",
            "--temperature",
            "-1",
        ): "unrecognised option --form; did you mean '--from'?",
        ("--vresion", "check"): "unrecognised option --vresion; known here: --help, -h; see parity --help",
        ("diff", "a", "b", "c"): "unrecognized arguments: c",
        (): "required: COMMAND",
    },
    "jaxtrain": {
        (
            "train",
            DEMO,
            "--activations",
            "0",
        ): "argument --activations: '0' is not a step; give 1 or more, or all",
        ("generate", DEMO): "one of the arguments --prompt --file is required",
        ("generate", DEMO, "--promt", "Why?"): "unrecognised option --promt; did you mean '--prompt'?",
        ("train", DEMO, "--setp", "run.steps=1"): "unrecognised option --setp; did you mean '--set'?",
        ("eval", DEMO, "--", "--examples"): "unrecognized arguments: --examples",
        (
            "generate",
            DEMO,
            "--prompt",
            "--what is a list?",
            "--top-k",
            "x",
        ): "argument --top-k: invalid int value",
    },
}
WRONG_WORDS["torchtrain"] = WRONG_WORDS["jaxtrain"]


@pytest.mark.parametrize("program", WRONG_WORDS)
def test_words_that_a_program_does_not_know_are_one_line(program: str):
    lines = WRONG_WORDS[program]
    for (argv, why), (code, told, loaded) in zip(
        lines.items(), probed(program, *map(list, lines)), strict=True
    ):
        assert (code, told.count("\n"), loaded) == (2, 1, []), told
        assert told.startswith(f"{program}: ")
        assert why in told
        assert told.endswith(" --help\n")
        assert f"see {program}" in told
        assert argv != ("checkpoint", "show") or "see trainspec checkpoint show --help" in told


def test_who_starts_the_processes_of_a_run_loads_no_framework(tmp_path):
    """They load it themselves, and would wait for it."""
    code = (
        "import sys\nfrom torchtrain import commands\nfrom torchtrain.cli import main\n"
        "commands.launch = lambda program, words, *, processes, logs, stop: print(processes, *words)\n"
        f"code = main(['train', {DEMO!r}, '--set', 'plan.data=2', '--out', {str(tmp_path / 'run')!r}])\n"
        f"print(code, sorted({FRAMEWORKS!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"2 train {DEMO} --set plan.data=2 --out {tmp_path}/run", "0 []"]
