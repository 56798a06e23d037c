"""An evaluation with a backend that says what it is told to: its figures, its files, who writes them, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from trainspec.data import IGNORED
from trainspec.errors import DataError, UserError, WeightsError
from trainspec.evaluation import loop
from trainspec.evaluation.choices import accuracies
from trainspec.evaluation.heldout import Choice, Question, questions_of
from trainspec.evaluation.request import EvaluationRequest
from trainspec.generation.choice import Sampling
from trainspec.generation.generation import Prompt
from trainspec.generation.request import Settings
from trainspec.plans.accelerators import Devices
from trainspec.runs.processes import Processes
from trainspec.runs.run import resolve
from trainspec.tasks import TASKS, write_prompt
from trainspec.text.store import find_tokenizer
from trainspec.training.run_data import open_data

EOS = 2
SETTINGS = Settings(max_tokens=60, batch=2)
DEVICES = Devices("jax", "cpu", 1, 1, 1, ("numpy",))
RECORDS = [
    {"instruction": "What is a list?", "output": "A sequence of items.", "references": ["Items in order."]},
    {"instruction": "What is a set?", "output": "Items without order."},
    {"instruction": "What is a dict?", "output": "Keys and their values."},
]
SAID = ["A sequence, of items!", "Items with an order.", "A number."]


@dataclass(frozen=True)
class State:
    step: int
    answers: tuple[str, ...]


class Told:
    """A backend that answers the n-th prompt with the state's n-th text; a token's loss grows with its id, and falls with the step."""

    def __init__(self, run, prompts: list[tuple[int, ...]], start: tuple[str, ...]) -> None:
        self.run, self.prompts, self.start = run, prompts, start
        self.tokenizer = find_tokenizer(run.recipe.data, run.directory, "")
        self.encoded: dict[str, list[int]] = {}
        self.rows = 0

    def init_state(self, run, *, like=None):
        return State(0, self.start)

    def decoding(self, state, *, length):
        return None

    def eval_step(self, state, batch):
        self.rows = max(self.rows, len(batch.rows))
        targets = batch.labels[batch.labels != IGNORED]
        return sum(loss_of(int(token), state.step) for token in targets), targets.size

    def next_logits(self, state, batch, last):
        logits = np.zeros((len(last), self.run.spec.vocab))
        for row, end in enumerate(last):
            ids = tuple(batch.input_ids[row, : end + 1].tolist())
            found = [n for n, prompt in enumerate(self.prompts) if ids[: len(prompt)] == prompt]
            rest = ids[len(self.prompts[found[0]]) :] if found else ()
            said = self.ids(state.answers[found[0]]) if found else []
            logits[row, said[len(rest)] if len(rest) < len(said) else EOS] = 1.0
        return logits

    def ids(self, text: str) -> list[int]:
        if text not in self.encoded:
            self.encoded[text] = self.tokenizer.encode(text, Path(self.run.recipe.data.cache))[1:]
        return self.encoded[text]


def loss_of(token: int, step: int) -> float:
    return (0.1 + token / 1000) / (1 + step)


def written(folder: Path, records: list[dict], name: str = "heldout.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(file)


@pytest.fixture
def evaluated(make_recipe, tmp_path: Path, monkeypatch, capsys):
    """What an evaluation gives, prints and writes; `trained` is what the trained model says, None where there is none."""

    def evaluate(
        records=RECORDS,
        start=("", "", ""),
        trained=SAID,
        examples=None,
        processes=None,
        loss_only=False,
        untrained=None,
        settings=SETTINGS,
        **data,
    ):
        run = resolve(make_recipe(data={"heldout": written(tmp_path, records)} | data))
        tokenizer = find_tokenizer(run.recipe.data, run.directory, "")
        prompts = [
            tuple(p["ids"])
            for p in tokenizer.prompts((), run.recipe.data.heldout, run.recipe.data, as_trained=True)[
                "prompts"
            ]
        ]
        backend, out = Told(run, prompts, tuple(start)), tmp_path / "run"
        if trained is not None:
            monkeypatch.setattr(
                loop, "newest_checkpoint", lambda out, processes: out / "checkpoints/step-000009"
            )
            monkeypatch.setattr(loop, "verify_together", lambda saved, processes: None)
            monkeypatch.setattr(
                loop, "restored", lambda *a, **k: (State(9, tuple(trained)), f"{out} at step 9")
            )
        request = EvaluationRequest(
            out, settings, examples, loss_only, untrained=trained is None if untrained is None else untrained
        )
        found = loop.evaluate(backend, run, request, processes=processes or Processes(), devices=DEVICES)
        return found, capsys.readouterr().out, out

    return evaluate


def read(out: Path) -> tuple[dict, list[dict]]:
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    return json.loads((out / "eval.json").read_text(encoding="utf-8")), [
        json.loads(line) for line in lines if line
    ]


def test_both_models_stand_side_by_side(evaluated):
    found, printed, out = evaluated()
    figures, predictions = read(out)
    assert [p["prediction"] for p in predictions] == SAID
    assert [p["untrained"]["prediction"] for p in predictions] == ["", "", ""]
    assert [p["references"] for p in predictions] == [
        ["A sequence of items.", "Items in order."], ["Items without order."], ["Keys and their values."],
    ]  # fmt: skip
    assert [p["scores"]["exact_match"] for p in predictions] == [100.0, 0.0, 0.0]
    trained, untrained = figures["trained"], figures["untrained"]
    assert trained["exact_match"] == pytest.approx(100 / 3)
    assert (untrained["exact_match"], untrained["f1"]) == (0.0, 0.0)
    assert trained["step"], untrained["step"] == (9, 0)
    assert untrained["heldout_loss"] == pytest.approx(10 * trained["heldout_loss"])
    assert trained["perplexity"] == pytest.approx(math.exp(trained["heldout_loss"]))
    assert set(figures["signatures"]) == {"heldout_loss", "perplexity", "exact_match", "f1"}
    assert figures["heldout"]["digest"] == found.heldout.digest
    assert (figures["settings"]["max_tokens"], figures["settings"]["sampling"]["temperature"]) == (60, 0.0)
    rows = {line.split()[0]: line.split()[1:3] for line in printed.splitlines() if line}
    assert rows["exact_match"] == ["0.00", "33.33"]
    assert rows["ended"][:2] == ["3", "of"]
    page = (out / "samples.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("What is a set?", "Items with an order.", "Items in order."))


def test_a_page_shows_texts_as_they_are(evaluated):
    _, _, out = evaluated(trained=["<b>&", "a\nb", "c"])
    page = (out / "samples.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;" in page
    assert "<b>" not in page


def columns(predictions: list[dict], folder: Path) -> tuple[str, str]:
    """References and predictions as the files that the libraries read."""
    files = {"ref": [p["references"][0] for p in predictions], "hyp": [p["prediction"] for p in predictions]}
    for name, texts in files.items():
        (folder / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(folder / "ref"), str(folder / "hyp")


def printed_by(*command: str) -> str:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=True).stdout


TRANSLATED = {
    "en": (
        ["Items in order.", "Items without order.", "Keys and their values."],
        ["Items in an order", "Items without any order.", "Keys and values."],
    ),
    "zh": (
        ["列表是有顺序的元素。", "集合里的元素没有顺序。", "字典有键和值。"],
        ["列表是有次序的元素。", "集合的元素没有顺序。", "字典里有键。"],
    ),
}


@pytest.mark.parametrize("language", TRANSLATED)
def test_figures_of_translations_are_those_of_sacrebleu_on_the_written_file(
    evaluated, tmp_path: Path, language: str
):
    references, said = TRANSLATED[language]
    records = [{"instruction": f"Translate {n}", "output": text} for n, text in enumerate(references)]
    _, _, out = evaluated(records, trained=said, task="translation", language=language)
    figures, predictions = read(out)
    assert [p["prediction"] for p in predictions] == said
    reference, hypothesis = columns(predictions, tmp_path)
    words = ["-tok", "zh"] if language == "zh" else []
    told = json.loads(
        printed_by(
            "sacrebleu",
            reference,
            "-i",
            hypothesis,
            "-m",
            "bleu",
            "chrf",
            "-w",
            "10",
            "--format",
            "json",
            *words,
        )
    )
    assert [figures["trained"]["bleu"], figures["trained"]["chrf"]] == pytest.approx(
        [m["score"] for m in told]
    )
    for mine, theirs in zip(("bleu", "chrf"), told, strict=True):
        assert figures["signatures"][mine] == f"{theirs['name']}|{theirs['signature']}"
    assert 0 == figures["untrained"]["bleu"] < figures["trained"]["bleu"] < 100  # control
    assert all(p["scores"] == {} for p in predictions)  # a corpus has a figure, an answer has none


def test_figures_of_summaries_are_those_of_rouge_on_the_written_file(evaluated, tmp_path: Path):
    said = ["A sequence of the items", "Items have no order.", "Keys."]
    records = [{key: r[key] for key in ("instruction", "output")} for r in RECORDS]
    _, _, out = evaluated(records, trained=said, task="summarisation")
    figures, predictions = read(out)
    reference, hypothesis = columns(predictions, tmp_path)
    table = tmp_path / "rouge.csv"
    printed_by(
        "rouge_score.rouge", f"--target_filepattern={reference}", f"--prediction_filepattern={hypothesis}",
        f"--output_filename={table}", "--aggregate=False",
    )  # fmt: skip
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    for name in ("rouge1", "rouge2", "rougeL"):
        theirs = [100 * float(row[f"{name}-F"]) for row in rows]
        assert figures["trained"][name] == pytest.approx(sum(theirs) / len(theirs), abs=1e-4)
        assert [p["scores"][name] for p in predictions] == pytest.approx(theirs, abs=1e-4)
    assert 0 == figures["untrained"]["rouge1"] < figures["trained"]["rouge1"] < 100  # control


def test_of_the_untrained_model_there_is_one_column(evaluated):
    _, printed, out = evaluated(trained=None)
    figures, predictions = read(out)
    assert "trained" not in figures
    assert "untrained" not in predictions[0]
    assert predictions[0]["prediction"] == ""
    assert printed.startswith("measuring the held-out loss and 3 answers of the untrained model alone\n")


def test_plain_text_has_a_loss_alone(evaluated, tmp_path: Path):
    found, printed, out = evaluated(
        [{"text": "A list."}, {"text": "A set."}], task="text", settings=Settings()
    )
    assert found.questions is None
    figures = json.loads((out / "eval.json").read_text())
    assert set(figures["trained"]) == {"of", "step", "heldout_loss", "perplexity"}
    assert sorted(path.name for path in out.iterdir()) == ["eval.json"]
    assert "perplexity" in printed


def test_the_loss_alone_is_a_line_and_writes_nothing(evaluated):
    found, printed, out = evaluated(loss_only=True, trained=None)
    assert found is None
    assert printed.startswith("held-out loss 0.")
    assert printed.endswith(" of the starting weights\n")
    assert not out.exists()


def test_the_first_records_are_answered_and_all_measured(evaluated):
    _, printed, out = evaluated(examples=2)
    figures, predictions = read(out)
    assert [p["record"] for p in predictions] == [1, 2]
    assert "2 prompts of" in printed
    assert "of 3, the first ones (--examples 2)" in printed
    _, _, out = evaluated()
    assert read(out)[0]["trained"]["heldout_loss"] == figures["trained"]["heldout_loss"]


def test_a_prompt_that_is_too_long_is_named(evaluated, make_recipe, tmp_path: Path):
    long = {"instruction": "What is " + "a word " * 200 + "?", "output": "Long."}
    records = [RECORDS[0], long, RECORDS[1]]
    _, printed, out = evaluated(records, trained=[SAID[0], "", SAID[1]])
    assert "1 held-out prompt too long for the model, not answered: record 2" in printed
    figures, predictions = read(out)
    assert figures["heldout"]["too_long"] == [2]
    assert [p["record"] for p in predictions] == [1, 3]
    run = resolve(make_recipe(data={"heldout": written(tmp_path, [long])}))
    with pytest.raises(
        DataError,
        match=r"every held-out prompt is too long: plain has positions for \d+ tokens.*, or do without$",
    ):
        questions_of(run, find_tokenizer(run.recipe.data, run.directory, ""), way_out="do without")


def test_a_record_without_a_response_is_named(make_recipe, tmp_path: Path):
    talk = [{"role": "user", "content": "Why?"}]
    answered = {"messages": [*talk, {"role": "assistant", "content": "So."}]}
    file = written(tmp_path, [answered, {"messages": talk}])
    run = resolve(make_recipe(data={"heldout": file}))
    tokenizer = find_tokenizer(run.recipe.data, run.directory, "")
    with pytest.raises(
        DataError, match=r"1 of 2 records have no response to compare with \(record 2\); .*, or do without$"
    ):
        questions_of(run, tokenizer, way_out="do without")
    assert questions_of(run, tokenizer, way_out="", examples=1).asked[0].references == ("So.",)  # control


def test_answers_in_training_need_no_reference(make_recipe, tmp_path: Path):
    called = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    talk = [
        {"role": "user", "content": "What is f?"},
        {"role": "assistant", "content": None, "tool_calls": called},
    ]
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    file = written(tmp_path, [{"messages": talk}])
    data = {"heldout": file, "chat_template": str(template)}
    run = resolve(make_recipe(data=data, run={"steps": 1, "eval_generations": 1}))
    _, opened = open_data(run)
    assert opened.questions is not None
    [question] = opened.questions.asked
    assert (question.prompt.reference, question.references) == (None, ())


def test_what_training_leaves_out_is_left_out_and_named(evaluated):
    blank, bad = {"instruction": " ", "output": "x"}, {"instruction": "Unanswered?"}
    records = [RECORDS[0], bad, RECORDS[1], blank]
    with pytest.raises(DataError, match="line 2: 'instruction' without 'output'"):
        evaluated(records, trained=SAID[:2], start=["", ""])
    _, printed, out = evaluated(records, trained=SAID[:2], start=["", ""], bad_records="skip")
    assert (
        "2 held-out records left out, not answered: records 2, 4 (line 2: 'instruction' without 'output'"
        in printed
    )
    figures, predictions = read(out)
    assert figures["heldout"]["left_out"] == [2, 4]
    assert (figures["heldout"]["records"], figures["heldout"]["answered"]) == (4, 2)
    assert [p["record"] for p in predictions] == [1, 3]
    assert "the first ones" not in printed
    _, printed, _ = evaluated(records[:1] + records[2:], trained=SAID[:2], start=["", ""])
    assert "1 held-out record left out, not answered: record 3 (line 3: the record is empty)" in printed


def test_conversations_have_a_loss_alone(evaluated, tmp_path: Path):
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    found, printed, out = evaluated([{"messages": talk}], settings=Settings())
    assert found.questions is None
    named = "neither an instruction nor a prompt with a completion as texts, which data.task=question_answering is measured on"
    assert f"{named}; the loss alone is measured" in printed
    figures = json.loads((out / "eval.json").read_text())
    assert set(figures["trained"]) == {"of", "step", "heldout_loss", "perplexity"}
    # As a prompt with a completion, a conversation is none the less one.
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    record = {"prompt": talk[:1], "completion": talk[1:]}
    found, printed, _ = evaluated([record], settings=Settings(), chat_template=str(template))
    assert found.questions is None
    assert named in printed


@pytest.mark.parametrize("task", ["question_answering", "translation", "summarisation"])
def test_a_prompt_with_a_completion_is_measured_as_the_same_instruction(evaluated, task: str):
    """A user who writes the task's prompt out has the same tokens, the same answers and the same figures."""
    asked = [{key: r[key] for key in ("instruction", "output")} for r in RECORDS]
    form = TASKS[task].prompts["en"]
    written_out = [
        {"prompt": write_prompt(form, instruction=r["instruction"], text=""), "completion": r["output"]}
        for r in asked
    ]
    found = {}
    for shape, records in {"instruction": asked, "completion": written_out}.items():
        _, printed, out = evaluated(records, task=task)
        figures, predictions = read(out)
        assert "3 prompts of" in printed
        found[shape] = (
            figures["trained"],
            figures["signatures"],
            [(p["prediction"], p["scores"]) for p in predictions],
        )
    assert found["instruction"] == found["completion"]
    assert (
        max(
            found["completion"][0][name]
            for name in ("f1", "chrf", "rouge1")
            if name in found["completion"][0]
        )
        > 0
    )


def test_a_task_without_metrics_measures_the_loss_of_completions_alone(evaluated):
    found, printed, _ = evaluated(
        [{"prompt": "Why?", "completion": "So."}], task="conversation", settings=Settings()
    )
    assert found.questions is None
    assert "answered" not in printed


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"examples": 1, "settings": Settings()}, "--examples"),
        ({"settings": Settings(max_tokens=3)}, "--max-tokens"),
        ({"settings": Settings(caches=False)}, "--no-cache"),
        ({"settings": Settings(sampling=Sampling(repetition_penalty=2.0))}, "--repetition-penalty"),
    ],
)
def test_how_to_answer_is_refused_where_nothing_is_answered(evaluated, given, named):
    with pytest.raises(UserError, match=rf"^{named}: has no effect"):
        evaluated([{"text": "A list."}], task="text", **given)


def test_a_damaged_checkpoint_is_found_before_anything_is_measured(evaluated, tmp_path: Path, monkeypatch):
    saved = tmp_path / "run/checkpoints/step-000009"
    saved.mkdir(parents=True)
    (saved / "checkpoint.json").write_text("{}")
    measured = []
    monkeypatch.setattr(Told, "eval_step", lambda self, state, batch: measured.append(batch))
    with pytest.raises(WeightsError, match=r"checkpoint\.json"):
        evaluated(trained=None, untrained=False)
    assert measured == []


def test_numbers_that_json_has_not_are_null(evaluated, monkeypatch):
    monkeypatch.setitem(globals(), "loss_of", lambda token, step: math.inf if step else 1.0)
    _, _, out = evaluated(CHOICES, trained=["", ""], start=["", ""])

    def refused(name: str):
        raise AssertionError(name)

    for line in (out / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        read_line = json.loads(line, parse_constant=refused)
        assert {c["log_likelihood"] for c in read_line["choices"]} == {None}
        assert None not in {c["log_likelihood"] for c in read_line["untrained"]["choices"]}  # control
    figures = json.loads((out / "eval.json").read_text(encoding="utf-8"), parse_constant=refused)
    assert (figures["trained"]["heldout_loss"], figures["trained"]["perplexity"]) == (None, None)


def test_a_corpus_is_scored_once_for_each_model(evaluated, monkeypatch):
    scored = []
    task = TASKS["translation"]
    score = type(task).score
    monkeypatch.setattr(
        type(task),
        "score",
        lambda self, answers, **k: scored.append(len(answers)) or score(self, answers, **k),
    )
    records = [{key: r[key] for key in ("instruction", "output")} for r in RECORDS]
    evaluated(records, task="translation")
    assert scored == [1, 3, 3]  # first one empty answer, which tries the libraries


def test_only_the_leader_prints_and_writes(evaluated):
    other = Processes(1, 2, lambda text: [text, text])
    found, printed, out = evaluated(processes=other)
    assert found.trained is not None
    assert (printed, out.exists()) == ("", False)


CHOICES = [
    {"instruction": "What is a list?", "output": "Items", "choices": ["Items", "A number of great length"]},
    {"instruction": "What is a set?", "output": "No", "choices": ["Yes, it is", "No"]},
]


def test_the_most_probable_choice_is_taken(evaluated):
    found, _, out = evaluated(CHOICES, trained=["", ""], start=["", ""])
    figures, predictions = read(out)
    shown = predictions[0]["choices"]
    question = found.asked[0]
    for mine, choice in zip(shown, question.choices, strict=True):
        answer = choice.ids[choice.first :]
        assert EOS not in answer  # as lm-eval measures the text alone
        assert choice.ids[: choice.first] == question.prompt.ids
        assert mine["log_likelihood"] == pytest.approx(-sum(loss_of(i, 9) for i in answer))
    # The shorter choice is the more probable one, as every token costs something: right in both. By character it is not.
    assert figures["trained"]["accuracy"] == 100.0
    assert figures["trained"]["accuracy_normalised"] == sum(
        100.0 * is_best(p, lambda c: c["log_likelihood"] / len(c["text"])) for p in predictions
    ) / len(predictions)
    assert [p["scores"]["accuracy"] for p in predictions] == [100.0, 100.0]


def is_best(prediction: dict, value) -> bool:
    return max(prediction["choices"], key=value)["text"] in prediction["references"]


def test_accuracies_by_hand():
    def question(number: int, right: str, *choices: str) -> Question:
        return Question(number, Prompt("?", (1,)), (right,), tuple(Choice(c, (1, 5), 1) for c in choices))

    asked = [question(1, "ab", "ab", "abcdefgh"), question(2, "x", "x", "y"), question(3, "z")]
    likelihoods = [(-2.0, -4.0), (-3.0, -3.0), ()]
    # By itself "ab" is right, by characters the long one is taken; of equal ones the first; no choice, no part.
    assert accuracies(asked, likelihoods) == {"accuracy": 100.0, "accuracy_normalised": 50.0}
    assert accuracies(asked, [(-2.0, -1.0), (-3.0, -2.0), ()]) == {
        "accuracy": 0.0,
        "accuracy_normalised": 0.0,
    }
    assert accuracies(asked[2:], likelihoods[2:]) == {}
