"""Prompts beside transformers' own template call, and beside what training makes of the same record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from jinja2 import Environment, StrictUndefined
from small import CACHE, ROOT, write_tokenizer
from transformers import AutoTokenizer

from trainspec.data import IGNORED, open_dataset
from trainspec.errors import DataError
from trainspec.preview import preview
from trainspec.recipe import Data, load_recipe
from trainspec.runs.run import resolve
from trainspec.text.store import Tokenizer, find_tokenizer

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "Items in order."},
    {"role": "user", "content": "And a tuple?"},
]
ANSWER = {"role": "assistant", "content": "One that stays."}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def asked(home: Path, records: list[dict], *, template: str | None = None, texts=(), **data) -> dict:
    """What is made of a file of records, or of texts."""
    file = None
    if records:
        file = home / "prompts.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = Data(**{"train": str(home / "train.jsonl"), "cache": str(CACHE)} | data)
    return Tokenizer(home, template, "2024-07-26").prompts(texts, str(file) if file else None, settings)


def test_a_conversation_ends_with_the_generation_prompt(home: Path):
    """With the answer in the record or without: it is the reference, and no part of the prompt."""
    theirs = AutoTokenizer.from_pretrained(home)
    theirs.chat_template = CHATML
    wanted = theirs.apply_chat_template(TURNS, add_generation_prompt=True)["input_ids"]
    found = asked(home, [{"messages": TURNS}, {"messages": [*TURNS, ANSWER]}], template=CHATML)
    assert [p["ids"] for p in found["prompts"]] == [wanted, wanted]
    assert [p["reference"] for p in found["prompts"]] == [None, ANSWER["content"]]
    assert found["stops"] == [2]
    without = theirs.apply_chat_template(TURNS, add_generation_prompt=False)["input_ids"]
    assert without != wanted  # control


def test_a_text_is_asked_as_the_training_data_ask(home: Path):
    theirs = AutoTokenizer.from_pretrained(home)
    theirs.chat_template = CHATML
    question = [{"role": "user", "content": "Why?"}]
    chat = theirs.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    (home / "train.jsonl").write_text(json.dumps({"messages": [*question, ANSWER]}) + "\n")
    found = asked(home, [], template=CHATML, texts=["Why?"])
    assert [p["ids"] for p in found["prompts"]] == [chat]
    (home / "train.jsonl").write_text(json.dumps({"instruction": "x", "output": "y"}) + "\n")
    [prompt] = asked(home, [], template=CHATML, texts=["Why?"])["prompts"]
    assert prompt["ids"] == theirs("Question: Why?\nAnswer:\n")["input_ids"]
    assert prompt["prompt"] == "Why?"
    [prompt] = asked(home, [], texts=["Why?"], task="text")["prompts"]
    assert prompt["ids"] == theirs("Why?")["input_ids"]


@pytest.mark.parametrize(
    "task", ["question_answering", "translation", "summarisation", "reading_comprehension"]
)
def test_a_prompt_is_what_training_has_before_the_first_target(
    make_recipe, model_dirs, tmp_path: Path, task: str
):
    records = [
        {"instruction": "What is it?", "input": "A list holds items.", "output": "A list."},
        {"instruction": "Short", "output": "Yes"},
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = make_recipe(data={"train": str(file), "task": task})
    run = resolve(recipe)
    tokenizer = find_tokenizer(recipe.data, run.directory, "")
    made = tokenizer.prompts((), str(file), recipe.data)["prompts"]
    batch = next(open_dataset(run, "train").in_order(2))
    for i, prompt in enumerate(made):
        first = int(np.flatnonzero(batch.labels[i] != IGNORED)[0])
        assert prompt["ids"] == batch.input_ids[i, :first].tolist()
        assert prompt["reference"] == records[i]["output"]


def test_lm_eval_reads_the_prompts_that_are_trained(make_recipe):
    """Its task file renders each record to our prompt, and its right choice is our reference."""
    task = yaml.safe_load((ROOT / "configs/lm-eval/question_answering.yaml").read_text(encoding="utf-8"))
    recipe = load_recipe(ROOT / "configs/question-answering.yaml")
    [source] = task["dataset_kwargs"]["data_files"].values()
    assert source == recipe.data.heldout
    recipe = make_recipe(data={"task": recipe.data.task, "language": recipe.data.language})
    tokenizer = find_tokenizer(recipe.data, resolve(recipe).directory, "")
    made = tokenizer.prompts((), str(ROOT / source), recipe.data)["prompts"]
    records = [json.loads(line) for line in (ROOT / source).read_text(encoding="utf-8").split("\n") if line]
    # As lm-eval renders it.
    text = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(task["doc_to_text"])
    assert len(made) == len(records) > 100
    for record, prompt in zip(records, made, strict=True):
        whole = tokenizer.encode(text.render(record), CACHE)
        assert whole == prompt["ids"]
        assert record[task["doc_to_target"]] == prompt["reference"]
        assert record[task["doc_to_choice"]] == [choice["text"] for choice in prompt["choices"]]


def test_of_the_first_records_alone_prompts_are_made(make_recipe, tmp_path: Path):
    file = tmp_path / "asked.jsonl"
    lines = ['{"instruction": "One?"}', '{"instruction": "Two?"}', '{"question": "Which column?"}']
    file.write_text("\n".join(lines) + "\n")
    recipe = make_recipe()
    tokenizer = find_tokenizer(recipe.data, resolve(recipe).directory, "")
    made = tokenizer.prompts((), str(file), recipe.data, first=2)
    assert [prompt["prompt"] for prompt in made["prompts"]] == ["One?", "Two?"]
    assert made["records"] == 3
    with pytest.raises(DataError, match="line 3"):  # control: it is looked at where all are asked for
        tokenizer.prompts((), str(file), recipe.data)


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_choice_is_what_training_makes_of_it_as_the_answer(
    make_recipe, model_dirs, tmp_path: Path, template: str | None
):
    record = {"instruction": "Which?", "input": "A pear or a plum.", "output": "A plum"}
    choices = ["A pear", "A plum"]
    file, asked = tmp_path / "train.jsonl", tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(record | {"output": choice}) + "\n" for choice in choices))
    asked.write_text(json.dumps(record | {"choices": choices}) + "\n")
    data = {"train": str(file)}
    if template is not None:
        (tmp_path / "t.jinja").write_text(template)
        data |= {"task": "conversation", "chat_template": str(tmp_path / "t.jinja")}
    recipe = make_recipe(data=data)
    run = resolve(recipe)
    tokenizer = find_tokenizer(recipe.data, run.directory, "")
    [made] = tokenizer.prompts((), str(asked), recipe.data)["prompts"]
    assert (made["reference"], made["references"]) == ("A plum", ["A plum"])
    assert [choice["text"] for choice in made["choices"]] == choices
    batch = next(open_dataset(run, "train").in_order(2))
    for i, choice in enumerate(made["choices"]):
        assert choice["ids"] == batch.input_ids[i, batch.segments[i] > 0].tolist()
        assert choice["first"] == int(np.flatnonzero(batch.labels[i] != IGNORED)[0])
        assert choice["ids"][: choice["first"]] == made["ids"]
    assert made["choices"][0]["ids"] != made["choices"][1]["ids"]


def test_a_prompt_of_a_file_is_asked_and_trained(make_recipe, model_dirs, tmp_path: Path):
    """In the language that the recipe names; the tokens, and so the digest of the data, are others.

    What the file is called does not matter.
    """
    file, prompts, copy = (tmp_path / name for name in ("train.jsonl", "prompts.yaml", "copy.json"))
    file.write_text(json.dumps({"instruction": "Go", "input": "a pear", "output": "b"}) + "\n")
    prompts.write_text(
        "translation:\n  en: |\n    {input}? {instruction}\n  zh: |\n    {instruction}\n    {input}\n"
    )
    copy.write_text(json.dumps({"translation": "{input}? {instruction}"}))
    shown = {}
    for name, fields in {
        "own": {},
        "zh": {"language": "zh"},
        "file": {"prompts": str(prompts)},
        "copy": {"prompts": str(copy)},
        "file, zh": {"prompts": str(prompts), "language": "zh"},
    }.items():
        recipe = make_recipe(data={"train": str(file), "task": "translation"} | fields)
        run = resolve(recipe)
        tokenizer = find_tokenizer(recipe.data, run.directory, "")
        [made] = tokenizer.prompts((), str(file), recipe.data)["prompts"]
        dataset = open_dataset(run, "train")
        ids, targets = dataset.record(0)
        assert ids[~targets].tolist() == made["ids"]
        shown[name] = (made["prompt"], dataset.digest, dataset.prompt)
    assert [text for text, _, _ in shown.values()] == [
        "Go\na pear\nTranslation:\n",
        "Go\na pear\n译文：\n",
        "a pear? Go\n",
        "a pear? Go\n",
        "Go\na pear\n",
    ]
    assert len({digest for _, digest, _ in shown.values()}) == 4
    assert shown["copy"] == shown["file"]
    assert shown["file"][2] == ("{input}? {instruction}",)


def test_the_preview_shows_the_prompt_of_instruction_records_alone(
    make_recipe, model_dirs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "train.jsonl"
    for record, is_shown in (
        ({"instruction": "Go", "output": "b"}, True),
        ({"messages": [{"role": "user", "content": "a"}, ANSWER]}, False),
    ):
        file.write_text(json.dumps(record) + "\n")
        recipe = make_recipe(data={"train": str(file), "task": "summarisation", "language": "zh"})
        dataset = open_dataset(resolve(recipe), "train")
        preview(dataset, dataset.batch(0, 1))
        said = "asked as\n    {instruction}\n    {input}\n    摘要：\n"
        assert (said in capsys.readouterr().out) == is_shown


def test_a_tokenizer_that_ends_texts_does_not_end_a_prompt(home: Path):
    text = (home / "tokenizer.json").read_text()
    settings = json.loads(text)
    single = settings["post_processor"]["single"]
    settings["post_processor"]["single"] = [*single, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    settings["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (home / "tokenizer.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(home)("Why?")["input_ids"][-1] == 2  # control
    [prompt] = asked(home, [], texts=["Why?"], task="text")["prompts"]
    assert prompt["ids"][-1] != 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ('{"input": "x"}', "line 2: no 'instruction'"),
        ('{"instruction": "a", "colour": "b"}', "line 2: field 'colour' is not used"),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        ('{"messages": []}', "line 2: 'messages' has no turn before the answer"),
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}', "line 2: 'messages' has no turn before"),
        ('{"messages": 3}', "line 2: 'messages' must be a list of turns, not a number"),
        ("[1]", "line 2: a record is a JSON object, not a list"),
    ],
)
def test_a_malformed_line_is_named(home: Path, line: str, said: str):
    file = home / "p.jsonl"
    file.write_text('{"instruction": "Why?"}\n' + line + "\n")
    with pytest.raises(DataError) as found:
        Tokenizer(home, None, "2024-07-26").prompts((), str(file), Data(train="none.jsonl"))
    assert said in str(found.value)
    assert str(found.value).startswith(str(file))
