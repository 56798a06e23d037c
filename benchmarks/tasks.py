"""Train and measure the four tasks on both backends, and write the page that shows it.

    python benchmarks/tasks.py [--only TASK ...] [--steps N] [--precision P] [--examples N] [--max-tokens N] [--out DIR] [--page FILE]

A run that is measured in DIR is not made again: remove it to start anew. One that was measured with other options is an error. A figure of
MUST_IMPROVE that does not get better is an error, as in float64 are figures or answers that differ between the backends: no page is written then.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainspec.generation.request import Settings
from trainspec.recipe import load_recipe
from trainspec.runs.run import resolve
from trainspec.training.run_data import open_data

BACKENDS = {"jaxtrain": "JAX", "torchtrain": "torch"}
RECIPES = {
    "question answering": "configs/question-answering.yaml",
    "reading comprehension": "configs/reading-comprehension.yaml",
    "summarisation": "configs/summarisation.yaml",
    "translation": "configs/translation.yaml",
}
# Figures that fall as a model learns; all others rise.
FALL = ("heldout_loss", "perplexity")
# Of each task the figures that must get better. The others are rare events for so small a model: a whole answer, a pair or four
# words in a row, a choice by its length.
MUST_IMPROVE = {
    "question answering": ("heldout_loss", "f1", "accuracy"),
    "reading comprehension": ("heldout_loss", "exact_match", "f1"),
    "summarisation": ("heldout_loss", "rouge1", "rougeL"),
    "translation": ("heldout_loss", "chrf"),
}
# What differs between the backends, by the precision of the runs.
PRECISIONS = {
    "fp64": "in float64, so that what differs between the backends is no rounding",
    "fp32": "in float32, where the backends round differently; what of a difference between them comes of it is not shown here",
}
# How far the backends' figures may be apart in float64, relative to the larger.
EQUAL = 1e-9
SAMPLES = 3


@dataclass(frozen=True)
class Result:
    """What one backend's run of a task has left: eval.json, and the lines of predictions.jsonl."""

    figures: dict[str, Any]
    predictions: list[dict[str, Any]]


def main() -> None:
    """Run what is missing, print the page, and write it where it is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--steps", type=int, help="updates, in place of the recipes' own epochs")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp64")
    parser.add_argument("--examples", type=int, default=24, help="held-out records that are answered (24)")
    parser.add_argument("--max-tokens", type=int, default=24, help="the longest answer (24)")
    parser.add_argument("--out", type=Path, default=Path("build/tasks"))
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    results = {
        task: {program: result(task, program, arguments) for program in BACKENDS} for task in arguments.only
    }
    text = page(results, arguments)
    print(text)
    failed = [line for task, by_program in results.items() for line in failures(task, by_program)]
    if arguments.precision == "fp64":
        failed += [line for task, by_program in results.items() for line in partings(task, by_program)]
    if failed:
        sys.exit("\n".join(failed))
    if arguments.page:
        arguments.page.write_text(text, encoding="utf-8")


def result(task: str, program: str, arguments: argparse.Namespace) -> Result:
    """The result of one run, which is trained and measured unless it is."""
    recipe, out = RECIPES[task], arguments.out / f"{task.replace(' ', '-')}-{program}"
    if not (out / "predictions.jsonl").exists():
        command = [sys.executable, "-m", program]
        changed = [f"precision.{name}={arguments.precision}" for name in ("policy", "reduce")]
        if arguments.steps:
            changed += [f"run.steps={arguments.steps}", "run.epochs=null"]
        settings = [word for setting in changed for word in ("--set", setting)]
        _run([*command, "train", recipe, "--out", str(out), *settings])
        limits = ["--examples", str(arguments.examples), "--max-tokens", str(arguments.max_tokens)]
        _run([*command, "eval", recipe, "--out", str(out), *limits, *settings])
        print(f"{task} on {BACKENDS[program]} is measured", file=sys.stderr, flush=True)
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    figures = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    if others := other_options(figures, arguments, updates=arguments.steps or updates(recipe)):
        sys.exit(f"{out} was measured with {', '.join(others)}; remove it, or name another --out")
    return Result(figures, [json.loads(line) for line in lines if line])


def updates(recipe: str) -> int:
    """How many updates a recipe's own epochs are."""
    _, data = open_data(resolve(load_recipe(Path(recipe))))
    return data.span.last


def other_options(figures: dict[str, Any], arguments: argparse.Namespace, *, updates: int) -> list[str]:
    """What a measured run was made with in place of what is asked."""
    settings = figures["settings"]
    asked = {
        "precision": (figures["precision"], arguments.precision),
        "examples": (settings["examples"], arguments.examples),
        "updates": (figures["trained"]["step"] if "trained" in figures else 0, updates),
    }
    as_asked = json.loads(json.dumps(asdict(Settings(max_tokens=arguments.max_tokens))))
    asked |= {name: (settings[name], as_asked[name]) for name in settings if name in as_asked}
    return [
        f"{name} {json.dumps(was)}, not {json.dumps(wanted)}"
        for name, (was, wanted) in asked.items()
        if was != wanted
    ]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr or done.stdout)


def failures(task: str, results: dict[str, Result]) -> list[str]:
    """A line for every figure that should have got better and has not, on any backend."""
    return [
        f"{task} on {BACKENDS[program]}: {name} was {before:.2f} and is {after:.2f}"
        for program, found in results.items()
        for name in MUST_IMPROVE[task]
        for before, after in [(found.figures["untrained"][name], found.figures["trained"][name])]
        if (after >= before if name in FALL else after <= before)
    ]


def partings(task: str, results: dict[str, Result]) -> list[str]:
    """A line for every figure, and one for all answers, that differ between the backends."""
    mine, theirs = (results[program] for program in BACKENDS)
    lines = []
    for model in ("untrained", "trained"):
        before, after = mine.figures[model], theirs.figures[model]
        lines += [
            f"{task}, {model}: {name} is {before[name]!r} on JAX and {after[name]!r} on torch"
            for name in mine.figures["signatures"]
            if not math.isclose(before[name], after[name], rel_tol=EQUAL)
        ]
    pairs = zip(mine.predictions, theirs.predictions, strict=True)
    apart = sum(a["ids"] != b["ids"] or a["untrained"]["ids"] != b["untrained"]["ids"] for a, b in pairs)
    return lines + [f"{task}: {apart} answers differ between the backends"] * bool(apart)


def head(arguments: argparse.Namespace, options: str = "") -> str:
    """What the page says before its figures; `options` are those of its command that come first."""
    steps, examples, tokens = arguments.steps, arguments.examples, arguments.max_tokens
    options += f" --precision {arguments.precision}" * (arguments.precision != "fp64")
    options += f" --steps {steps}" * bool(steps) + f" --examples {examples} --max-tokens {tokens}"
    held = "; ".join(f"{task}: {', '.join(names)}" for task, names in MUST_IMPROVE.items())
    return HEAD.format(
        examples=examples,
        tokens=tokens,
        length=f" for {steps} updates each" if steps else "",
        options=options,
        precision=PRECISIONS[arguments.precision],
        held=held.replace("_", " "),
    )


def page(results: dict[str, dict[str, Result]], arguments: argparse.Namespace) -> str:
    """The page: what was done, a table, samples of every task, and how others measure the same."""
    options = f" --only {' '.join(map(repr, results))}" * (len(results) < len(RECIPES))
    lines = [head(arguments, options)]
    lines += ["| task | figure | untrained | JAX | torch | how |", "|---|---|---|---|---|---|"]
    for task, by_program in results.items():
        lines += rows(task, by_program)
    lines += ["", "## The same answers", "", *differences(results), "", "## Samples", ""]
    lines += ["As JAX's runs have written them: `samples.html` of a run has all of them side by side.", ""]
    for task, by_program in results.items():
        lines += samples(task, by_program["jaxtrain"])
    return "\n".join(lines).rstrip() + "\n" + TAIL


def rows(task: str, results: dict[str, Result]) -> list[str]:
    """A task's rows of the table."""
    jax, torch = (results[program].figures for program in BACKENDS)
    made = []
    for name, how in jax["signatures"].items():
        decimals = 4 if name == "heldout_loss" else 2
        values = [jax["untrained"][name], jax["trained"][name], torch["trained"][name]]
        cells = " | ".join(f"{value:.{decimals}f}" for value in values)
        made.append(f"| {task} | {name} | {cells} | {how.replace('|', ' ')} |")
    return made


def differences(results: dict[str, dict[str, Result]]) -> list[str]:
    """How many answers have the same tokens on both backends, before training and after it."""
    lines = ["| task | updates | untrained | trained |", "|---|---|---|---|"]
    for task, by_program in results.items():
        jax, torch = (by_program[program].predictions for program in BACKENDS)
        before = sum(a["untrained"]["ids"] == b["untrained"]["ids"] for a, b in zip(jax, torch, strict=True))
        after = sum(a["ids"] == b["ids"] for a, b in zip(jax, torch, strict=True))
        updates = by_program["jaxtrain"].figures["trained"]["step"]
        lines.append(f"| {task} | {updates} | {before} of {len(jax)} | {after} of {len(jax)} |")
    return lines


def samples(task: str, result: Result) -> list[str]:
    """A task's first answers: the reference, the untrained model's and the trained one's."""
    lines = [f"### {task.capitalize()}", ""]
    for line in result.predictions[:SAMPLES]:
        lines += ["```", line["prompt"].rstrip("\n"), "```", "", "| | |", "|---|---|"]
        texts = {
            "reference": " / ".join(line["references"]),
            "untrained": line["untrained"]["prediction"],
            "trained": line["prediction"],
        }
        lines += [f"| {name} | {cell(text)} |" for name, text in texts.items()]
        lines.append("")
    return lines


def cell(text: str) -> str:
    """A text in a table of Markdown, as it is."""
    if not text:
        return "*nothing*"
    shown = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", "↵")
    return f"<code>{shown.replace('*', '&#42;').replace('_', '&#95;').replace('`', '&#96;')}</code>"


HEAD = """# Tasks: what a run has learnt

```sh
jaxtrain train configs/question-answering.yaml --out runs/qa
jaxtrain eval configs/question-answering.yaml --out runs/qa                 # torchtrain: the same; of the same weights the same figures, up to rounding
jaxtrain eval configs/question-answering.yaml --out runs/qa --loss-only     # the held-out loss in one line; writes nothing
```

`eval` measures the model that the recipe starts from and the newest checkpoint in `--out`, both in one run, and refuses a directory without one;
`--untrained` measures the first of the two alone. Measured are the held-out loss of all records with its perplexity; for the tasks `question_answering`, `reading_comprehension`, `summarisation` and `translation` the answers to the
held-out prompts, by the task's metrics; and for records with `choices` the share of right ones. Answers are greedy; the options of
`generate` apply, and `--examples N` answers the first N records only. A prompt that leaves the model no room is named and not
answered, and so are records that training leaves out (empty ones, and bad ones with `data.bad_records: skip`); a record without a response
is an error. Metrics are for instruction records and for prompts with completions as texts: of conversations and plain text the loss alone is measured, and
options that say how to answer are refused. A checkpoint that is damaged is refused before anything is measured.

| file in `--out` | what it has |
|---|---|
| `eval.json` | every figure of both models and how it is computed, settings, versions, digests of held-out tokens and tokenizer |
| `predictions.jsonl` | a line for each prompt: `record`, `prompt`, `references`, `prediction`, `ids`, `finish`, `scores` of the answer by itself, `choices` with their log-likelihoods, and the same of the `untrained` model |
| `samples.html` | prompts, references and both models' answers side by side |

`run.eval_generations: N` in a recipe answers the first N held-out prompts at each measurement during training: in TensorBoard's texts, and in
`samples.jsonl` with `step`, `prompt`, `text`, `reference` (null where the record has none). A run that is stopped and resumed has the lines of
one that was not, but for an update in whose answers it was stopped.

**Choices** are compared by the log-likelihood of their tokens after the prompt, without the token that ends a response. `accuracy` takes
the largest, `accuracy_normalised` the largest for each character of the choice's text, as lm-eval's `acc` and `acc_norm` do; of equal ones the first.

## Figures

The demo's model (1.1 million parameters, so that figures are low and some stay at 0), LoRA by the recipes in `configs/`{length}, {precision};
the first {examples} held-out records are answered in at most {tokens} tokens. Figures but the loss and the perplexity are in percent. Made by
`python benchmarks/tasks.py{options} --page docs/tasks.md`. It fails where one of these figures does not get better
({held}), and in float64 where the backends' figures or answers differ.
"""
# What was measured once by hand, with lm-eval in a venv of its own.
LM_EVAL = (
    "Of the demo's model after 20 updates of `configs/demo.yaml`, and 60 questions\nwith four choices each, lm-eval 0.4.13 found acc 0.2500 "
    "and acc_norm 0.2667, and `eval` accuracy 25.00 and accuracy_normalised 26.67."
)
TAIL = f"""
## By lm-eval

An exported model is read by others' evaluations. lm-eval wants a venv of its own (`pip install 'lm-eval[hf]==0.4.13'`), and runs where `configs` is:

```sh
jaxtrain export configs/question-answering.yaml --out runs/qa --merge
lm_eval --model hf --model_args pretrained=runs/qa/merged,dtype=float32 --include_path configs/lm-eval --tasks twintrain_question_answering
```

`configs/lm-eval/question_answering.yaml` is the task: the same records, the same prompt. {LM_EVAL}
It counts the end of the prompt's last line as part of every choice, as it moves blanks from a prompt's end there. That adds the same number to all
log-likelihoods of a record, so `acc` is our `accuracy`; `acc_norm` divides it by each choice's length, and may differ from `accuracy_normalised` in a
record that is close. Other tasks of lm-eval's take the same command.

## What holds it

`tests/trainspec/test_evaluation.py` (figures of the written files by the command lines of sacreBLEU and rouge-score, what is named and refused),
`tests/trainspec/test_tasks.py` (metrics), `tests/torchtrain/test_choices.py` (accuracies by transformers alone), `tests/backends/test_evaluate.py`
(answers are those of `generate`; samples after a stop and a resume), `tests/test_evaluate_twins.py` (both backends and several plans in float64).
[Decision 0036](decisions/0036-evaluation.md) says why.
"""


if __name__ == "__main__":
    main()
