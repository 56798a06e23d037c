"""Records as people have them: each shape is read, and what is not used is refused by name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import ROOT

from trainspec.text.asked import without_response
from trainspec.text.fields import BadRecord
from trainspec.text.files import Raw, read_raw
from trainspec.text.locate import Style, Unlocated, assistant_spans
from trainspec.text.records import Chat, Reader, Text

NO_TOKENS = re.compile("(?!)")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}
TEMPLATE = (
    "{{ tools }}{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.reasoning_content }}{% endfor %}"
)


def read(record: object, *, template: str | None = TEMPLATE, **settings: Any) -> Chat | Text:
    settings = {"task": "question_answering"} | settings
    return Reader(**settings).read(record, lambda tools: template)


def chat(record: object, **settings: Any) -> Chat:
    found = read(record, **settings)
    assert isinstance(found, Chat)
    return found


def text(record: object, **settings: Any) -> list[tuple[str, bool]]:
    found = read(record, **settings)
    assert isinstance(found, Text)
    return found.stretches


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_null_is_absent():
    record = {"instruction": "Name a fruit.", "input": None, "output": "A pear.", "extra": None}
    assert text(record) == [("Question: Name a fruit.\nAnswer:\n", False), ("A pear.", True)]


def test_an_output_is_trained_as_it_is_written():
    output = "    if x:\n        return 1\n    return 0\n"
    assert text({"instruction": "Go on.", "input": "def f(x):", "output": output})[-1] == (output, True)


def test_a_system_field_and_data_system_stand_in_front():
    record = {"instruction": "a", "output": "b"}
    assert text(record | {"system": "Be short."})[0][0] == "Be short.\nQuestion: a\nAnswer:\n"
    assert text(record, system="Be kind.")[0][0] == "Be kind.\nQuestion: a\nAnswer:\n"
    assert text(record | {"system": "Be short."}, system="Be kind.")[0][0].startswith("Be short.\n")


def test_columns_name_fields_and_ignore_leaves_them_out():
    record = {"question": "a", "context": "c", "answer": "b", "id": 7}
    columns = {"instruction": "question", "output": "answer", "input": "context"}
    assert text(record, columns=columns, ignore=frozenset({"id"}))[0][0] == "Question: a\nc\nAnswer:\n"
    with pytest.raises(BadRecord, match="field 'id' is not used"):
        read(record, columns=columns)
    with pytest.raises(BadRecord, match="both 'instruction' and 'question'"):
        read({"instruction": "x", "question": "a", "output": "b"}, columns={"instruction": "question"})


def test_the_english_prompts_are_those_of_earlier_runs():
    """Tokens of runs that were made hang on every letter."""
    asked = {
        "question_answering": ("Question: a\nb\nAnswer:\n", "Question: a\nAnswer:\n"),
        "summarisation": ("a\nb\nSummary:\n", "a\nSummary:\n"),
        "translation": ("a\nb\nTranslation:\n", "a\nTranslation:\n"),
        "reading_comprehension": ("b\nQuestion: a\nAnswer:\n", "Question: a\nAnswer:\n"),
    }
    for task, (with_input, without) in asked.items():
        assert text({"instruction": "a", "input": " b ", "output": "c"}, task=task)[0][0] == with_input
        assert text({"instruction": "a", "output": "c"}, task=task)[0][0] == without


def test_a_prompt_of_a_users():
    record = {"instruction": "{input}", "input": "b", "output": "c"}
    prompt = ("Do {instruction}: {{x}}", "Text: {input}", "End")
    assert text(record, prompt=prompt)[0][0] == "Do {input}: {x}\nText: b\nEnd\n"
    assert text(record | {"input": ""}, prompt=prompt)[0][0] == "Do {input}: {x}\nEnd\n"
    assert text(record | {"input": ""}, prompt=("{instruction} {input}",))[0][0] == "{input} \n"


def test_an_output_may_be_the_first_of_the_references():
    question = {"instruction": "a", "references": ["b", "c"]}
    assert text(question)[-1] == ("b", True)
    assert text(question | {"output": "c"})[-1] == ("c", True)
    squad = {"id": "7", "title": "t", "context": "x", "question": "a"}
    squad["answers"] = {"text": ["b", "c"], "answer_start": [1, 2]}  # type: ignore[assignment]
    columns = {"instruction": "question", "input": "context", "references": "answers"}
    settings = {"columns": columns, "ignore": frozenset({"id", "title"}), "task": "reading_comprehension"}
    assert text(squad, **settings) == [("x\nQuestion: a\nAnswer:\n", False), ("b", True)]
    reader = Reader(**settings)  # type: ignore[arg-type]
    assert without_response(squad, reader)[1:] == ("b", ["b", "c"], [])
    assert without_response(question | {"output": "d"}, reader)[1:] == ("d", ["d", "b", "c"], [])
    assert without_response(question | {"output": "c"}, reader)[1:] == ("c", ["c", "b"], [])
    assert without_response({"instruction": "a"}, reader)[1:] == (None, [], [])
    assert without_response({"instruction": "a", "output": "b"}, reader)[1:] == ("b", ["b"], [])
    assert without_response({"prompt": "a", "completion": "b"}, reader)[1:] == ("b", ["b"], [])


def test_choices_are_no_part_of_what_is_trained():
    record = {"instruction": "a", "output": "c", "choices": ["b", "c"]}
    assert text(record) == text({"instruction": "a", "output": "c"})
    assert without_response(record, Reader("question_answering"))[1:] == ("c", ["c"], ["b", "c"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"references": "b"}, "'references' must be a list of texts, not 'b'"),
        ({"references": [1]}, "'references' must be a list of texts"),
        ({"references": {"text": ["b"], "from": [0]}}, "'references' must be a list of texts"),
        ({"references": []}, "'references' is empty, and there is no 'output'"),
        ({"output": 1, "references": ["b"]}, "'output' must be text, not 1"),
        ({"output": "b", "choices": ["b"]}, "'choices' are two or more different texts"),
        ({"output": "b", "choices": ["b", "b"]}, "'choices' are two or more different texts"),
        ({"output": "b", "choices": ["b", " "]}, "'choices' are two or more different texts"),
        ({"output": "b", "choices": "bc"}, "'choices' must be a list of texts"),
        ({"output": "d", "choices": ["b", "c"]}, "the output 'd' is none of the 'choices'"),
        ({"output": "b", "choices": ["b", "c"], "references": ["b"]}, "'references' beside 'choices'"),
        ({"output": "b", "reference": ["b"]}, "field 'reference' is not used .*did you mean 'references'"),
        ({"answers": ["b"]}, r"such as data.columns={references: answers}"),
    ],
)
def test_malformed_references_and_choices_are_refused(fields: dict[str, Any], said: str):
    record = {"instruction": "a"} | fields
    with pytest.raises(BadRecord, match=said):
        read(record)
    if "answers" not in fields:
        with pytest.raises(BadRecord, match=said):
            Reader("question_answering").read(
                without_response(record, Reader("question_answering")).record, lambda tools: None
            )
    for other in ({"messages": [user("a"), assistant("b")]}, {"prompt": "a", "completion": "b"}):
        with pytest.raises(BadRecord, match="field 'references' is not used"):
            read(other | {"references": ["b"]})


def test_prompt_and_completion_as_texts_and_as_messages():
    assert text({"prompt": "Name a fruit.", "completion": " A pear."}) == [
        ("Name a fruit.", False),
        (" A pear.", True),
    ]
    record = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    assert chat(record).learnt == [False, False, False, True]
    with pytest.raises(BadRecord, match="need a chat template"):
        read(record, template=None)


def test_sharegpt_conversations():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert chat({"conversations": turns}).messages == [
        {"role": "system", "content": "s"},
        user("a"),
        assistant("b"),
    ]
    calls = {"from": "function_call", "value": json.dumps(CALL["function"])}
    found = chat({"conversations": [turns[1], calls, {"from": "observation", "value": "dry"}]})
    assert found.messages[1]["tool_calls"] == [CALL["function"]]
    assert [m["role"] for m in found.messages] == ["user", "assistant", "tool"]
    with pytest.raises(BadRecord, match="unknown 'from' 'humam'; did you mean 'human'"):
        read({"conversations": [{"from": "humam", "value": "a"}]})


def test_openai_messages():
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a fruit."}]
    as_text = CALL | {"function": CALL["function"] | {"arguments": '{"town": "Rome"}'}}
    record = {
        "messages": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": [as_text]},
            {"role": "tool", "content": "dry", "tool_call_id": "1"},
            assistant("It is dry.") | {"weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    }
    found = chat(record)
    assert found.messages[0]["role"] == "system"
    assert found.messages[1]["content"] == "Name a fruit."
    assert "content" not in found.messages[2]
    assert found.messages[2]["tool_calls"] == [CALL]
    assert found.tools == record["tools"]
    assert found.learnt == [False, False, True, False, True]
    assert chat(record, template=TEMPLATE + "developer").messages[0]["role"] == "developer"
    assert chat(record | {"tools": json.dumps(record["tools"])}).tools == record["tools"]


@pytest.mark.parametrize(
    ("fields", "learnt"),
    [({"weight": 0}, False), ({"weight": 1}, True), ({"train": False}, False), ({"train": True}, True)],
)
def test_a_turn_is_learnt_unless_it_says_otherwise(fields: dict, learnt: bool):
    found = chat({"messages": [user("a"), assistant("b") | fields, user("c"), assistant("d")]})
    assert found.learnt == [False, learnt, False, True]
    assert not {"weight", "train"} & set(found.messages[1])


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (assistant("x") | {"weight": 0.5}, "a turn is learnt or not"),
        (user("x") | {"train": True}, "only the assistant's are learnt"),
        (assistant("x") | {"wieght": 0}, "did you mean 'weight'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "only parts of type 'text'"),
        ({"role": "assistant", "content": None}, "needs a text 'content', or tool calls"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, "a function with a name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "arguments of a tool call are not JSON",
        ),
        ("hello", "a message is a JSON object, not text"),
    ],
)
def test_messages_that_cannot_be_read(message: object, says: str):
    with pytest.raises(BadRecord, match=says):
        read({"messages": [message]})


def test_a_template_may_name_more_roles_and_fields():
    record = {"messages": [{"role": "observation", "content": "x", "mood": "calm"}]}
    with pytest.raises(BadRecord, match="unknown role"):
        read(record)
    with pytest.raises(BadRecord, match="field 'mood' of a message"):
        read(record, template="{% if m.role == 'observation' %}")
    assert chat(record, template="{% if m.role == 'observation' %}{{ m.mood }}")


def test_without_a_template_tools_are_refused_and_turns_written_out():
    found = read({"messages": [user("a"), assistant(" b ")]}, template=None)
    assert isinstance(found, Text)
    assert found.stretches == [("User:\n", False), ("a\n", False), ("Assistant:\n", False), ("b\n", True)]
    assert found.turns == [0, 2]
    with pytest.raises(BadRecord, match=r"set data\.chat_template"):
        read({"messages": [user("a")], "tools": [{"name": "f"}]}, template=None)


def test_data_system_takes_the_place_of_none_only():
    record = {"messages": [user("a"), assistant("b")]}
    assert chat(record, system="Be kind.").messages[0] == {"role": "system", "content": "Be kind."}
    own = {"messages": [{"role": "system", "content": "mine"}, *record["messages"]]}
    assert chat(own, system="Be kind.").messages == own["messages"]
    with pytest.raises(BadRecord, match=r"data\.system is given"):
        read({"prompt": "a", "completion": "b"}, system="Be kind.")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["messages", "role", "content", "conversations", "from", "value", "tools", "tool_calls", "function", "name", "weight", "prompt", "completion", "instruction", "output", "text"]), inner, max_size=4), max_leaves=12))  # fmt: skip
def test_whatever_a_record_is_it_is_read_or_refused(record: object):
    for template in (TEMPLATE, None):
        said = "one line"
        try:
            read(record, template=template)
        except BadRecord as error:
            said = str(error)
        assert len(said.splitlines()) == 1


def values(path: Path) -> list[Any]:
    return [raw.value() for raw in read_raw(str(path))]


def test_files_in_their_many_forms(tmp_path: Path):
    records = [{"instruction": "ä", "output": "b"}, {"instruction": "c", "output": "d"}]
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    forms = {
        "plain.jsonl": "\n".join(lines).encode(),
        "bom-crlf.jsonl": b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n",
        "separators.jsonl": "\n".join(lines).replace('"c"', '"c\u2028"').encode(),
        "array.json": json.dumps(records, indent=2).encode(),
        "array1.json": json.dumps(records).encode(),
        "lines.json": "\n".join(lines).encode(),
    }
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        found = values(tmp_path / name)
        if name == "separators.jsonl":
            assert found[1]["instruction"] == "c\u2028"
        else:
            assert found == records, name


def test_text_files_keep_their_lines_and_lose_their_mark(tmp_path: Path):
    file = tmp_path / "t.txt"
    file.write_bytes(b"\xef\xbb\xbfFirst.\r\n  indented\r\n\r\n\r\nSecond.")
    assert values(file) == [{"text": "First.\n  indented\n"}, {"text": "Second.\n"}]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"output": "Good \\ud83d morning"}', "half of a surrogate pair"),
        ('{"a": ' + "[" * 100_000, "nested too deep"),
        ('{"a": 1' + "0" * 5000 + "}", "cannot be read"),
        ("{", "not JSON"),
    ],
)
def test_lines_that_are_no_record(line: str, says: str):
    with pytest.raises(BadRecord, match=says):
        Raw("line 1", line, True).value()


def test_whole_surrogate_pairs_are_text():
    assert Raw("line 1", '{"a": "\\ud83d\\ude00"}', True).value() == {"a": "\U0001f600"}


def rendered(messages: list[dict], prompt: bool) -> str:
    """A template that moves the system text into the last user's turn, and closes turns with <e> and a new line."""
    said = [m for m in messages if m["role"] != "system"]
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    last = max((i for i, m in enumerate(said) if m["role"] == "user"), default=-1)
    words = [
        f"[{system + '|' if i == last and system else ''}{m['content']}]"
        if m["role"] == "user"
        else f" {m.get('content', '').strip()}<e>\n"
        for i, m in enumerate(said)
    ]
    return "".join(words)


def test_turns_are_found_where_a_template_writes_earlier_ones_anew():
    messages = [{"role": "system", "content": "S"}, user("a"), assistant("b "), user("b"), assistant("b")]
    whole = rendered(messages, False)
    spans = assistant_spans(whole, messages, rendered, Style.of(rendered, NO_TOKENS))
    assert [whole[s.start : s.end] for s in spans] == [" b<e>", " b<e>"]
    assert [whole[s.next_turn :][:3] for s in spans] == ["[S|", ""]


def test_what_cannot_be_found_is_said():
    messages = [user("a"), assistant("b")]
    counted = lambda some, prompt: f"{len(some)}{prompt}"  # noqa: E731
    with pytest.raises(Unlocated, match="does not write an assistant's content once"):
        assistant_spans(counted(messages, False), messages, counted, Style.of(counted, NO_TOKENS))


def test_nothing_here_needs_the_locale(tmp_path: Path):
    """Every file is read as UTF-8, whatever the environment says."""
    (tmp_path / "t.jinja").write_text("{{ messages }} é", encoding="utf-8")
    (tmp_path / "d.jsonl").write_text('{"text": "é"}\n', encoding="utf-8")
    code = (
        "from trainspec.text.files import read_raw; from trainspec.text.store import read_template\n"
        f"assert read_template({str(tmp_path / 't.jinja')!r}).endswith('\\xe9')\n"
        f"assert [r.value() for r in read_raw({str(tmp_path / 'd.jsonl')!r})] == [{{'text': '\\xe9'}}]\n"
    )
    plain = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
    }
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=plain)
