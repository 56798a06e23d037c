"""Damaged input of every kind is used as it is written, or refused in one line: no traceback, nothing taken silently.

`make test` tries a part; 5,000 are tried by `make test-full`, or, with what each says, by
`PYTHONPATH=tests python -m damage.judge KIND FIRST LAST`.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from damage.case import Whole, linked, write_whole
from damage.cases import DAMAGE
from damage.judge import Program, complaints, try_cases

# Of each kind so many are tried by `make test`.
PART = {
    "recipe": 60,
    "override": 60,
    "config": 40,
    "weights": 15,
    "adapter": 15,
    "tokenizer": 30,
    "template": 25,
    "records": 30,
    "table": 0,  # the library that reads tables takes as long to load as all the others
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return write_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))  # what `datasets` has read
        with Program() as opened:
            yield opened


def check(kind: str, number: int, program: Program, whole: Whole, folder: Path) -> None:
    tally = try_cases(kind, range(number), program, whole, folder)
    print(kind, dict(tally.ended), f"{tally.seconds:.0f} s")
    assert not tally.wrong, "\n".join(tally.wrong[:20])
    assert {"accepted", "refused"} <= set(tally.ended)


@pytest.mark.parametrize("kind", [kind for kind, number in PART.items() if number])
def test_a_part_of_the_damaged_inputs(kind: str, program: Program, whole: Whole, tmp_path: Path):
    check(kind, PART[kind], program, whole, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("kind", DAMAGE)
def test_all_damaged_inputs(kind: str, program: Program, whole: Whole, tmp_path: Path):
    check(kind, DAMAGE[kind][1], program, whole, tmp_path)


def test_there_are_5000():
    assert sum(number for _, number in DAMAGE.values()) == 5000
    assert set(PART) == set(DAMAGE)


# What was found this way, each once.


def recipe(whole: Whole, folder: Path, *, command: str, **sections: dict[str, Any]) -> list[str]:
    tree: dict[str, Any] = {
        "model": {"from": str(whole.model)},
        "data": {"train": str(folder / "d.jsonl"), "sequence_tokens": 64, "cache": "cache"},
        "run": {"steps": 1},
    }
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    (folder / "r.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return [command, str(folder / "r.yaml")]


def records(folder: Path, *given: Any) -> None:
    lines = (line if isinstance(line, str) else json.dumps(line) for line in given)
    (folder / "d.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


QA = {"instruction": "Name a fruit.", "output": "A pear."}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def a_row_of_one_token(folder: Path, whole: Whole) -> list[str]:
    records(folder, QA)
    return recipe(whole, folder, command="data", data={"sequence_tokens": 1, "too_long": "split"})


def a_message_of_several_lines(folder: Path, whole: Whole) -> list[str]:
    records(folder, QA)
    data = {"sequence_tokens": 2}
    return recipe(whole, folder, command="show", data=data, run={"steps": None, "epochs": 1})


def a_word_as_long_as_a_page(folder: Path, whole: Whole) -> list[str]:
    return recipe(whole, folder, command="show", **{"x" * 9000: {}})


def an_adapter(folder: Path, whole: Whole, **settings: Any) -> list[str]:
    adapter = linked(whole.adapters / "lora", folder / "adapter", "adapter_config.json")
    config = json.loads((whole.adapters / "lora/adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | settings))
    method = {"kind": "lora", "rank": 1, "alpha": 8.0, "adapter": str(adapter)}
    return recipe(whole, folder, command="show", method=method)


def an_adapter_with_half_a_letter(folder: Path, whole: Whole) -> list[str]:
    return an_adapter(folder, whole, peft_type="\ud800")


def an_adapter_that_is_true(folder: Path, whole: Whole) -> list[str]:
    return an_adapter(folder, whole, r=True)


def an_adapter_that_says_false_in_quotes(folder: Path, whole: Whole) -> list[str]:
    return an_adapter(folder, whole, use_rslora="false")


def a_config(folder: Path, whole: Whole, **settings: Any) -> list[str]:
    model = linked(whole.model, folder / "model", "config.json")
    config = json.loads((whole.model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))
    return recipe(whole, folder, command="show", model={"from": str(model)})


def more_layers_than_memory(folder: Path, whole: Whole) -> list[str]:
    return a_config(folder, whole, num_hidden_layers=2**31)


def a_null(folder: Path, whole: Whole) -> list[str]:
    return a_config(folder, whole, hidden_size=None)


def a_speaker_that_is_an_object(folder: Path, whole: Whole) -> list[str]:
    records(folder, {"conversations": [{"from": {}, "value": "Hi"}]})
    return recipe(whole, folder, command="data")


def arguments_that_are_no_object(folder: Path, whole: Whole) -> list[str]:
    call = {"function": {"name": "f", "arguments": "[1]"}}
    records(folder, {"messages": [{"role": "assistant", "tool_calls": [call]}]})
    return recipe(whole, folder, command="data", data={"tokenizer": str(whole.chat)})


def arguments_that_are_too_deep(folder: Path, whole: Whole) -> list[str]:
    call = {"function": {"name": "f", "arguments": "[" * 90_000}}
    records(folder, {"messages": [{"role": "assistant", "tool_calls": [call]}]})
    return recipe(whole, folder, command="data", data={"tokenizer": str(whole.chat)})


def reasoning_that_is_a_number(folder: Path, whole: Whole) -> list[str]:
    records(folder, {"messages": [{"role": "assistant", "content": "x", "reasoning_content": 5}]})
    return recipe(whole, folder, command="data", data={"tokenizer": str(whole.chat)})


def a_line_in_another_encoding(folder: Path, whole: Whole) -> list[str]:
    (folder / "d.jsonl").write_bytes(json.dumps(QA).encode() + b'\n{"instruction": "\xe4"}\n')
    return recipe(whole, folder, command="data")


def a_template(folder: Path, whole: Whole, source: str) -> list[str]:
    records(folder, CHAT)
    (folder / "t.jinja").write_text(source)
    return recipe(whole, folder, command="data", data={"chat_template": str(folder / "t.jinja")})


def a_template_that_writes_half_a_letter(folder: Path, whole: Whole) -> list[str]:
    return a_template(folder, whole, "{{ '\\ud800' }}{% for m in messages %}{{ m.content }}</s>{% endfor %}")


def a_tokenizer(folder: Path, whole: Whole, change: Callable[[dict[str, Any]], None], name: str) -> list[str]:
    records(folder, QA)
    home = linked(whole.chat, folder / "tokenizer", name)
    tree = json.loads((whole.chat / name).read_text())
    change(tree)
    (home / name).write_text(json.dumps(tree))
    return recipe(whole, folder, command="data", data={"tokenizer": str(home)})


def a_tokenizer_that_makes_its_library_panic(folder: Path, whole: Whole) -> list[str]:
    return a_tokenizer(
        folder, whole, lambda t: t["model"].update(continuing_subword_prefix="nan"), "tokenizer.json"
    )


def a_tokenizer_that_makes_its_library_crash(folder: Path, whole: Whole) -> list[str]:
    return a_tokenizer(
        folder, whole, lambda t: t["model"].update(continuing_subword_prefix="/"), "tokenizer.json"
    )


def a_tokenizer_that_puts_an_unknown_token_in_front(folder: Path, whole: Whole) -> list[str]:
    token = {"SpecialToken": {"id": "<", "type_id": 0}}
    return a_tokenizer(
        folder, whole, lambda t: t["post_processor"]["single"].insert(0, token), "tokenizer.json"
    )


def a_token_as_older_files_have_it(folder: Path, whole: Whole) -> list[str]:
    token = {"content": "</s>", "lstrip": False, "special": True, "__type": "AddedToken"}
    return a_tokenizer(folder, whole, lambda t: t.update(eos_token=token), "tokenizer_config.json")


def a_named_template_that_is_null(folder: Path, whole: Whole) -> list[str]:
    named = [{"name": "default", "template": None}, {"name": "tool_use", "template": "x"}]
    return a_tokenizer(folder, whole, lambda t: t.update(chat_template=named), "tokenizer_config.json")


def a_template_whose_name_is_a_number(folder: Path, whole: Whole) -> list[str]:
    named = [{"name": 5, "template": "x"}, {"name": "tool_use", "template": "x"}]
    return a_tokenizer(folder, whole, lambda t: t.update(chat_template=named), "tokenizer_config.json")


def a_name_that_no_disk_can_hold(folder: Path, whole: Whole) -> list[str]:
    return recipe(whole, folder, command="data", data={"chat_template": "x" * 5000})


FOUND: list[tuple[Callable[[Path, Whole], list[str]], str]] = [
    (a_row_of_one_token, "no usable record: raise data.sequence_tokens"),
    (a_message_of_several_lines, "no usable record"),
    (a_word_as_long_as_a_page, "xxx: unknown key; known here: batch,"),
    (a_name_that_no_disk_can_hold, "xxx...: File name too long"),
    (an_adapter_with_half_a_letter, "peft_type '\\ud800'; method.kind=lora starts from"),
    (an_adapter_that_is_true, "r is True, the recipe says 1"),
    (an_adapter_that_says_false_in_quotes, "use_rslora is 'false', the recipe says False"),
    (more_layers_than_memory, "num_hidden_layers: input should be less than or equal to 10000"),
    (a_null, "hidden_size: input should be a valid integer, not null"),
    (a_speaker_that_is_an_object, "line 1: unknown 'from' {}"),
    (arguments_that_are_no_object, "the arguments of a tool call must be an object, not [1]"),
    (arguments_that_are_too_deep, "the arguments of a tool call are not JSON"),
    (reasoning_that_is_a_number, "'reasoning_content' must be text, not 5"),
    (a_line_in_another_encoding, "d.jsonl line 2: not UTF-8 text"),
    (a_template_that_writes_half_a_letter, "chat template: 'utf-8' codec can't encode character '\\ud800'"),
    (a_named_template_that_is_null, "a chat template must be text, not None"),
    (a_template_whose_name_is_a_number, "/tokenizer: '<' not supported"),
    (a_tokenizer_that_makes_its_library_panic, "transformers cannot load its tokenizer (slice index"),
    (
        a_tokenizer_that_puts_an_unknown_token_in_front,
        "transformers cannot load its tokenizer (no entry found",
    ),
    (a_token_as_older_files_have_it, ""),
    # The last one, since another worker has to start behind it.
    (a_tokenizer_that_makes_its_library_crash, "/tokenizer: "),
]


@pytest.mark.parametrize(("make", "says"), FOUND, ids=[make.__name__ for make, _ in FOUND])
def test_what_was_found(
    make: Callable[[Path, Whole], list[str]], says: str, program: Program, whole: Whole, tmp_path: Path
):
    argv = make(tmp_path, whole)
    ended = program.run(argv)
    assert list(complaints(ended)) == []
    assert ended.code == (2 if says else 0)
    assert says in ended.err
    if argv[0] == "show" and ended.out:
        assert set(yaml.safe_load(ended.out)) >= {"model", "data", "run"}


@pytest.mark.full
def test_a_damaged_table_is_told_once(program: Program, whole: Whole, tmp_path: Path):
    pytest.importorskip("datasets")
    shutil.copy(__file__, tmp_path / "d.parquet")
    argv = recipe(whole, tmp_path, command="data", data={"train": str(tmp_path / "d.parquet")})
    ended = program.run(argv)
    assert list(complaints(ended)) == []
    assert "datasets cannot read it" in ended.err
