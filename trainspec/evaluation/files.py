"""What an evaluation writes: figures for programs, predictions for other tools, and a page of samples to read.

OUT/eval.json            every figure of both models, with how it is computed, settings, versions and digests
OUT/predictions.jsonl    a line for each held-out prompt: prompt, prediction, references
OUT/samples.html         prompts, references and both models' answers side by side; `page`
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainspec.evaluation.choices import are_right
from trainspec.evaluation.evaluation import Evaluation
from trainspec.evaluation.heldout import Question
from trainspec.evaluation.page import page
from trainspec.generation.generation import Generation
from trainspec.tasks import Answer
from trainspec.versions import installed_versions

FIGURES, PREDICTIONS, SAMPLES = "eval.json", "predictions.jsonl", "samples.html"


def write(evaluation: Evaluation) -> list[Path]:
    """Write all files; which they are."""
    out = evaluation.request.out
    out.mkdir(parents=True, exist_ok=True)
    contents = {
        FIGURES: json.dumps(figures(evaluation), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    }
    if evaluation.questions:
        lines = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in predictions(evaluation))
        contents[PREDICTIONS] = "".join(f"{line}\n" for line in lines)
        contents[SAMPLES] = page(evaluation)
    for name, content in contents.items():
        (out / name).write_text(content, encoding="utf-8")
    return [out / name for name in contents]


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """The contents of eval.json."""
    recipe, request, questions = evaluation.run.recipe, evaluation.request, evaluation.questions
    packages = (*evaluation.devices.packages, "transformers")
    found: dict[str, Any] = {
        "task": recipe.data.task,
        "language": recipe.data.language,
        "model": recipe.model.from_,
        "method": recipe.method.model_dump(mode="json")["kind"],
        "precision": recipe.precision.policy,
        "backend": evaluation.devices.backend,
        "versions": installed_versions(packages),
        "heldout": {
            "source": recipe.data.heldout,
            "digest": evaluation.heldout.digest,
            "tokenizer": evaluation.heldout.tokenizer_digest,
        },
    }
    if questions:
        found["heldout"] |= {
            "records": questions.records,
            "answered": len(questions.asked),
            "too_long": list(questions.too_long),
            "left_out": list(questions.left_out),
        }
        settings = asdict(request.settings)
        del settings["scores"]
        found["settings"] = settings | {"examples": request.examples}
    for name, measurement in evaluation.models.items():
        finite = {key: _finite(value) for key, value in evaluation.figures[name].items()}
        found[name] = {"of": measurement.whose, "step": measurement.step} | finite
        if questions:
            found[name]["ended"] = measurement.ended
    return found | {"signatures": evaluation.signatures}


def predictions(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """The lines of predictions.jsonl: what the newest model says, and in `untrained` what the starting one does."""
    said_by = {
        name: [
            _said(evaluation, *of_question)
            for of_question in zip(
                evaluation.asked,
                measurement.generations,
                evaluation.answers(measurement),
                measurement.log_likelihoods,
                strict=True,
            )
        ]
        for name, measurement in evaluation.models.items()
    }
    for index, question in enumerate(evaluation.asked):
        said = {name: lines[index] for name, lines in said_by.items()}
        line = {
            "record": question.number,
            "prompt": question.prompt.prompt,
            "references": list(question.references),
        }
        if "trained" in said:
            yield line | said["trained"] | {"untrained": said["untrained"]}
        else:
            yield line | said["untrained"]


def _said(
    evaluation: Evaluation, question: Question, made: Generation, answer: Answer, likelihoods: Sequence[float]
) -> dict[str, Any]:
    """One model's answer to a question, and how good it is by itself."""
    scores = evaluation.of_answer(answer)
    found = {"prediction": made.text, "finish": made.finish, "ids": list(made.ids), "scores": scores}
    if question.choices:
        scores |= {name: 100.0 * is_right for name, is_right in are_right(question, likelihoods).items()}
        found["choices"] = [
            {"text": choice.text, "log_likelihood": _finite(likelihood)}
            for choice, likelihood in zip(question.choices, likelihoods, strict=True)
        ]
    return found


def _finite(value: float) -> float | None:
    """A number that JSON has."""
    return value if math.isfinite(value) else None
