"""Tokens as transformers makes them, through the worker process and the cache: what is learnt, cut, counted and refused."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import ROOT, write_tokenizer
from transformers import AutoTokenizer

from trainspec.data import IGNORED, Dataset, open_dataset
from trainspec.errors import DataError
from trainspec.runs.run import resolve
from trainspec.text.store import Tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture
def open_(make_recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., Dataset]:
    """Opens records with fields of `data`; `template` is the source of a chat template."""

    def make(records: list[Any], *, template: str | bytes | None = None, **fields: Any) -> Dataset:
        file = tmp_path / "d.jsonl"
        file.write_text(
            "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8"
        )
        if template is not None:
            (tmp_path / "t.jinja").write_bytes(template.encode() if isinstance(template, str) else template)
            fields["chat_template"] = str(tmp_path / "t.jinja")
        return open_dataset(resolve(make_recipe(data={"train": str(file)} | fields)), "train")

    return make


def shown(data: Dataset, number: int = 0) -> tuple[str, str]:
    """A record's text, and what of it is learnt."""
    ids, targets = data.record(number)
    (_, whole), (_, learnt) = data.pieces([ids, ids[targets]])
    return whole, learnt


def test_a_template_s_assistant_is_learnt_with_its_end_token_and_no_blank_behind_it(open_):
    messages = [*CHAT, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "So long."}]
    whole, learnt = shown(open_([{"messages": messages}], template=CHATML))
    assert whole == "<|user|>Hi</s>\n<|assistant|>Hello.</s>\n<|user|>Bye</s>\n<|assistant|>So long.</s>\n"
    assert learnt == "Hello.</s>So long.</s>"


def test_turns_of_weight_0_are_read_and_not_learnt(open_):
    messages = [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[0], {"role": "assistant", "content": "Yes."}]
    whole, learnt = shown(open_([{"messages": messages}], template=CHATML))
    assert "Hello." in whole
    assert learnt == "Yes.</s>"


def test_generation_tags_decide(open_):
    template = (
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    )
    assert shown(open_([{"messages": CHAT}], template=template)) == ("user:Hi;assistant:Hello.;", "HiHello.")


def test_what_a_template_drops_is_no_target_and_is_counted(open_):
    template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1].lstrip()")
    messages = [CHAT[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."}]
    data = open_([{"messages": messages}], template=template)
    assert shown(data) == ("<|user|>Hi</s>\n<|assistant|>Hello.</s>\n", "Hello.</s>")
    assert "warning: 1 of 1 records: loses text in the template" in data.summary


def test_what_cannot_be_located_is_counted_and_the_rest_is_trained(open_):
    template = (
        "{% if messages | length > 2 %}{{ messages | length }}{{ add_generation_prompt }}{% else %}"
        + CHATML
        + "{% endif %}"
    )
    data = open_([{"messages": CHAT}, {"messages": CHAT * 2}], template=template)
    assert "skipped: 1 not located (the template does not write an assistant's content once)" in data.summary
    assert data.num_examples == 1


def test_no_end_token_among_the_targets_is_said(open_):
    in_front = "{% for m in messages %}{% if not loop.first %}</s>{% endif %}{{ m.role }} {{ m.content }}{% endfor %}{% if add_generation_prompt %}</s>assistant {% endif %}"
    assert "no end token is among the targets" in open_([{"messages": CHAT}], template=in_front).summary
    assert "no end token" not in open_([{"messages": CHAT}], template=CHATML).summary


def test_tools_of_which_a_template_says_nothing_are_counted(open_):
    record = {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}
    assert "1 of 1 records: has tools, of which" in open_([record], template=CHATML).summary
    with_tools = "{{ tools | tojson }}" + CHATML
    data = open_([record], template=with_tools)
    assert "has tools" not in data.summary
    assert shown(data)[0].startswith('[{"type": "function", "function": {"name": "f"}}]')


def test_tool_calls_that_a_template_drops_are_counted(open_):
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}],
    }
    record = {"messages": [CHAT[0], call, *CHAT]}
    silent = CHATML.replace("m['content']", "m['content'] if 'content' in m")
    assert "1 of 1 records: loses tool calls in the template" in open_([record], template=silent).summary
    written = silent.replace("</s>", "{{ m.tool_calls | tojson if 'tool_calls' in m }}</s>")
    assert "loses tool calls" not in open_([record], template=written).summary


def test_templates_see_transformers_environment_and_the_recipe_s_date(open_):
    template = (
        "{{ strftime_now('%d %b %Y') }} {{ bos_token }} {{ {'a': '<é>'} | tojson }} {{ documents is none }} "
        + CHATML
    )
    assert shown(open_([{"messages": CHAT}], template=template))[0].startswith(
        '26 Jul 2024 <s> {"a": "<é>"} True '
    )
    other = open_([{"messages": CHAT}], template=template, date="2025-01-02")
    assert shown(other)[0].startswith("02 Jan 2025")


def test_two_begin_tokens_of_a_template_are_said(open_):
    data = open_([{"messages": CHAT}], template="{{ bos_token }}{{ bos_token }}" + CHATML)
    assert "1 of 1 records: begins with two begin tokens" in data.summary
    assert "two begin" not in open_([{"messages": CHAT}], template="{{ bos_token }}" + CHATML).summary


def test_odd_ends_are_without_a_target(open_):
    records = [
        {"messages": [*CHAT, CHAT[0]]},
        {"messages": []},
        {"messages": [{"role": "user", "content": "only me"}]},
    ]
    data = open_(records, template=CHATML)
    assert "3 records make 1 segments" in data.summary
    assert "skipped: 2 without a target" in data.summary


def test_text_that_has_its_begin_and_end_tokens_gets_no_more(open_):
    data = open_([{"text": "<s>[INST] Name a fruit. [/INST] A pear. </s>"}], task="text")
    assert shown(data)[0] == "<s>[INST] Name a fruit. [/INST] A pear. </s>"
    ids, targets = data.record(0)
    assert ids.tolist().count(1) == 1
    assert ids.tolist().count(2) == 1
    assert targets[-1]
    assert "had its begin token already" in data.summary


def test_bad_records_are_told_all_at_once(open_):
    lines = ['{"instruction": "a", "output": "b"}', *["{"] * 7, '{"instruction": "c"}']
    with pytest.raises(
        DataError,
        match=r"line 2: not JSON: [^;]* \(in 7 records\); line 9: [^;]*; 8 bad records of 9: line 2-9; fix them",
    ) as caught:
        open_(lines)
    assert len(str(caught.value).splitlines()) == 1
    data = open_(lines, bad_records="skip")
    assert "skipped: 8 bad" in data.summary
    assert re.search("skipped as bad: line 2: not JSON.*; line 2-9$", data.summary, re.MULTILINE)


def test_a_line_that_is_no_utf8_is_a_bad_record(open_, make_recipe: Callable[..., Any], tmp_path: Path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b'{"instruction": "a", "output": "b"}\n{"instruction": "caf\xe9", "output": "b"}\n')
    with pytest.raises(DataError, match=r"line 2: not UTF-8 text \(.* at byte 20 of the line\)"):
        open_dataset(resolve(make_recipe(data={"train": str(file)})), "train")
    data = open_dataset(resolve(make_recipe(data={"train": str(file), "bad_records": "skip"})), "train")
    assert data.records == 1


def test_task_text_takes_no_chat(open_):
    with pytest.raises(DataError, match=r"'messages' with data\.task=text, which takes a 'text'"):
        open_([{"messages": CHAT}], task="text")


def test_a_tokenizer_that_is_edited_is_read_again(open_, tokenizer: Path, tmp_path: Path):
    """The worker lives on between the two."""
    before = open_([RECORD], tokenizer=str(tokenizer), cache=str(tmp_path / "one")).record(0)[0]
    file = tokenizer / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["post_processor"] = None
    file.write_text(json.dumps(content), encoding="utf-8")
    after = open_([RECORD], tokenizer=str(tokenizer), cache=str(tmp_path / "two")).record(0)[0]
    assert after.tolist() == before[1:].tolist()


def test_a_killed_helper_ends_the_filling(tmp_path: Path, tokenizer: Path):
    """Of a large file, on several processes: one line, not a wait for ever."""
    file = tmp_path / "large.jsonl"
    line = json.dumps({"instruction": "q " * 50, "output": "a " * 50}) + "\n"
    file.write_text(line * 60_000)
    code = (
        "import json, os, sys; from trainspec.text import fill; fill._LARGE_BYTES = 1\n"
        "encode = fill._BatchEncoder.encode\n"
        "fill._BatchEncoder.encode = lambda self, batch: os.kill(os.getpid(), 9) if batch[0].where == 'line 1281' else encode(self, batch)\n"
        "fill.fill(json.loads(sys.argv[1]))"
    )
    job = {"task": "question_answering", "columns": [], "ignore": [], "bad_records": "stop", "system": None}
    job |= {"source": str(file), "folder": str(tmp_path), "tokenizer": str(tokenizer), "chat_template": None}
    job |= {"date": "2024-07-26", "digest": "", "prompt": None}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(job)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    assert "a process that tokenises was killed" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("begins", ["worker.import_transformers(); ", ""], ids=["as-the-worker", "control"])
def test_the_worker_makes_the_same_tokens_without_torch(begins: str, tokenizer: Path):
    code = (
        f"import sys; from trainspec.text import worker; {begins}"
        "from trainspec.text.fill import encoder_of; encoder = encoder_of(sys.argv[1], None, '2024-07-26', '')\n"
        "print('torch' in sys.modules, encoder.encode_plain('q a q')); import torch"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tokenizer)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )  # fmt: skip
    wanted = AutoTokenizer.from_pretrained(tokenizer)("q a q")["input_ids"]
    assert (done.stdout, done.stderr) == (f"{not begins} {wanted}\n", "")


def test_a_template_that_refuses_a_record_is_a_bad_record(open_):
    template = "{{ raise_exception('no system here') }}"
    with pytest.raises(DataError, match="line 1: chat template: no system here"):
        open_([{"messages": CHAT}], template=template)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (b"\xff\xfe{", "t.jinja: not UTF-8 text"),
        ("{% for %}", "data.chat_template: chat template line 1: Expected an expression"),
        ("{% include 'x' %}", "line 1: chat template: "),
        ("{{ ''.__class__.__mro__ }}", "line 1: chat template: access to attribute '__class__'"),
    ],
)
def test_templates_that_are_none(open_, template: str | bytes, says: str):
    with pytest.raises(DataError, match=says) as caught:
        open_([{"messages": CHAT}], template=template)
    assert len(str(caught.value).splitlines()) == 1


def test_split_segments_start_at_turns_and_with_the_begin_token(open_):
    messages = [
        m
        for i in range(8)
        for m in ({"role": "user", "content": f"q{i} " * 9}, {"role": "assistant", "content": f"a{i} " * 9})
    ]
    template = "{{ bos_token }}" + CHATML
    data = open_([{"messages": messages}], template=template, too_long="split", sequence_tokens=160)
    assert "1 too long (split)" in data.summary
    assert data.num_examples > 2
    for batch in data.in_order(1):
        [ids], [labels], [segments] = batch.input_ids, batch.labels, batch.segments
        assert ids[0] == 1
        assert labels[0] == labels[1] == IGNORED
        [(_, text)] = data.pieces([ids[segments > 0]])
        assert text.startswith("<s><|user|>q")
        assert text.endswith("</s>\n")
    whole = np.concatenate([b.input_ids[0, 1:][b.segments[0, 1:] > 0] for b in data.in_order(1)])
    assert (whole == data.record(0)[0][1:]).all()


def test_a_turn_longer_than_a_row_is_cut_where_the_row_ends(open_):
    data = open_([{"instruction": "q", "output": "x " * 400}], too_long="split", sequence_tokens=100)
    lengths = [int((b.segments > 0).sum()) for b in data.in_order(1)]
    assert lengths[:-1] == [100] * (len(lengths) - 1)
    assert all(b.input_ids[0, 0] == 1 for b in data.in_order(1))


def test_a_chat_without_a_template_is_written_out_and_said(open_):
    data = open_([{"messages": CHAT}])
    assert shown(data) == ("<s>User:\nHi\nAssistant:\nHello.\n</s>", "Hello.\n</s>")
    assert "written as `User:` and `Assistant:`" in data.summary


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    write_tokenizer(directory)
    return directory


def change(directory: Path, **fields: Any) -> str:
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")
    return str(directory)


RECORD = {"instruction": "a", "output": "b"}


def test_a_padding_id_behind_the_embedding_is_not_used(open_, tokenizer: Path):
    data = open_([RECORD], tokenizer=change(tokenizer, pad_token="<padding>"))
    assert "padding is 2: the tokenizer's padding token has id 320, the model 320 tokens" in data.summary
    batch = data.batch(0, 1)
    assert (batch.input_ids[batch.segments == 0] == 2).all()


def test_a_special_token_without_an_id_is_refused_where_it_is_used(open_, tokenizer: Path):
    with pytest.raises(DataError, match="token 320, its eos token '<end>'; plain has only 320"):
        open_([RECORD], tokenizer=change(tokenizer, eos_token="<end>"))


def test_special_tokens_that_only_their_own_map_knows(open_, tokenizer: Path):
    (tokenizer / "tokenizer_config.json").unlink()
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    assert shown(open_([RECORD], tokenizer=str(tokenizer)))[1] == "b</s>"


def test_no_end_token_at_all_is_said(open_, tokenizer: Path):
    data = open_([RECORD], tokenizer=change(tokenizer, eos_token=None))
    assert shown(data)[1] == "b"
    assert "no end token is among the targets" in data.summary


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"eos_token": 5}, "transformers cannot load its tokenizer"),
        ({"chat_template": []}, "none called default|chat template"),
        ({"chat_template": [{"name": "tools", "template": "x"}]}, "no default"),
        ({"tokenizer_class": "NoSuchTokenizer"}, "transformers cannot load|"),
        ({"auto_map": {"AutoTokenizer": ["x.Y", None]}, "tokenizer_class": "Y"}, "transformers cannot load|"),
    ],
)
def test_odd_tokenizer_settings_are_transformers_or_one_line(open_, tokenizer: Path, fields: dict, says: str):
    try:
        open_([{"messages": CHAT}], tokenizer=change(tokenizer, **fields))
    except DataError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert str(tokenizer) in message, message


def test_a_directory_without_a_tokenizer(open_, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no tokenizer; set data\.tokenizer"):
        open_([RECORD], tokenizer=str(tmp_path / "empty"))


def test_the_cache_follows_template_tokenizer_and_settings(open_, tokenizer: Path, tmp_path: Path):
    cache = tmp_path / "own"
    settings: list[dict[str, Any]] = [
        {},
        {"template": CHATML},
        {"template": CHATML + " "},
        {"template": CHATML, "system": "Be kind."},
        {"template": CHATML, "date": "2025-01-01"},
        {"tokenizer": change(tokenizer, chat_template=CHATML)},
    ]
    for number, setting in enumerate(settings, 1):
        open_([{"messages": CHAT}], cache=str(cache), **setting)
        open_([{"messages": CHAT}], cache=str(cache), **setting)
        assert len([f for f in cache.iterdir() if f.is_dir()]) == number, setting


def test_the_text_of_a_prompt_is_encoded_once_in_a_cache(tokenizer: Path, tmp_path: Path):
    found = Tokenizer(tokenizer, None, "2024-07-26")
    ids = found.encode("what is", tmp_path)
    assert ids[0] == 1
    [file] = (tmp_path / "texts").iterdir()
    file.write_text("[7]")
    assert found.encode("what is", tmp_path) == [7]


def test_cells_of_a_csv_are_text(make_recipe: Callable[..., Any], tmp_path: Path):
    (tmp_path / "d.csv").write_text('instruction,input,output\nIs it?,NA,007\n"a, b",,"x\ny"\n')
    data = open_dataset(resolve(make_recipe(data={"train": str(tmp_path / "d.csv")})), "train")
    assert shown(data, 0) == ("<s>Question: Is it?\nNA\nAnswer:\n007</s>", "007</s>")
    assert shown(data, 1) == ("<s>Question: a, b\nAnswer:\nx\ny</s>", "x\ny</s>")
    (tmp_path / "d.csv").write_text("instruction;output\na;b\n")
    with pytest.raises(DataError, match="not by ';'"):
        open_dataset(resolve(make_recipe(data={"train": str(tmp_path / "d.csv")})), "train")


def test_chats_of_a_table_are_those_of_lines(open_, make_recipe: Callable[..., Any], tmp_path: Path):
    """A table gives every struct the fields of all: what one record has not is no null in it."""
    import datasets

    datasets.disable_progress_bars()
    call = lambda arguments: {"function": {"name": "f", "arguments": arguments}}  # noqa: E731
    records = [
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [call({"city": "Rome"})]}, *CHAT]},
        {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [call({"when": "noon"})]}, *CHAT]},
    ]
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content if 'content' in m }}{{ m.tool_calls | tojson if "
        "'tool_calls' in m }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    lines = open_(records, template=template)
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "d.parquet"))
    data = {"train": str(tmp_path / "d.parquet"), "chat_template": str(tmp_path / "t.jinja")}
    table = open_dataset(resolve(make_recipe(data=data)), "train")
    assert table.digest == lines.digest
    assert "None" not in shown(table)[0]
    assert "null" not in shown(table)[0]


@pytest.mark.parametrize("form", ["parquet", "csv", "saved"])
def test_what_datasets_reads(open_, make_recipe: Callable[..., Any], tmp_path: Path, form: str):
    import datasets

    datasets.disable_progress_bars()
    records = [{"question": f"q{i}", "output": f"a{i}"} for i in range(9)]
    rows = datasets.Dataset.from_list(records)
    target = tmp_path / f"d.{form}"
    {"parquet": rows.to_parquet, "csv": rows.to_csv, "saved": rows.save_to_disk}[form](str(target))
    columns = {"columns": {"instruction": "question"}}
    found = open_dataset(resolve(make_recipe(data={"train": str(target)} | columns)), "train")
    assert found.digest == open_(records, **columns).digest
    shutil.rmtree(target) if target.is_dir() else target.unlink()
