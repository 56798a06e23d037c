import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainspec.data import IGNORED, Dataset, open_dataset
from trainspec.errors import DataError
from trainspec.recipe import Recipe
from trainspec.records import ChatTemplate, read_records
from trainspec.tokens import read_codec

Make = Callable[..., Recipe]
RECORDS = [
    {"instruction": "What?", "input": "max(a, b)", "output": "The larger one."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    {"instruction": "Why?", "output": "Because."},
]


def write(path: Path, records: list) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


@pytest.fixture
def dataset(make_recipe: Make, tmp_path: Path) -> Callable[..., Dataset]:
    def make(records: list, *, seed: int = 0, **fields) -> Dataset:
        data = {"train": write(tmp_path / "d.jsonl", records)} | fields
        return open_dataset(make_recipe(data=data, run={"seed": seed}), "train")

    return make


def documents(data: Dataset, step: int, examples: int) -> list[tuple[str, str]]:
    """(whole text, text that counts) of every document of a batch."""
    batch = data.batch(step, examples)
    found = []
    for i in range(examples):
        for number in range(1, batch.segments[i].max() + 1):
            at = batch.segments[i] == number
            counted = at & (batch.labels[i] != IGNORED)
            found.append((data.decode(batch.input_ids[i, at]), data.decode(batch.input_ids[i, counted])))
    return found


def test_only_completions_count(dataset):
    found = dict(documents(dataset(RECORDS), 0, 3))
    assert found["<s>Question: What?\nmax(a, b)\nAnswer:\nThe larger one.</s>"] == "The larger one.</s>"
    assert found["<s>User:\nHi\nAssistant:\nHello.\n</s>"] == "Hello.\n</s>"
    assert found["<s>Question: Why?\nAnswer:\nBecause.</s>"] == "Because.</s>"


def test_loss_on_all_counts_everything_but_each_first_token(dataset):
    for whole, counted in documents(dataset(RECORDS, loss_on="all"), 0, 3):
        assert counted == whole.removeprefix("<s>")


def test_labels_are_the_inputs_where_they_count_and_never_a_first_token(dataset):
    batch = dataset(RECORDS * 5, packing=True).batch(0, 2)
    counted = batch.labels != IGNORED
    assert (batch.labels[counted] == batch.input_ids[counted]).all()
    assert not counted[(batch.positions == 0)].any()
    assert not counted[batch.segments == 0].any()
    assert batch.target_tokens == counted.sum()


def test_packed_rows_restart_positions_and_number_segments(dataset):
    batch = dataset(RECORDS * 5, packing=True).batch(0, 2)
    for segments, positions in zip(batch.segments, batch.positions, strict=True):
        for number in range(1, segments.max() + 1):
            assert positions[segments == number].tolist() == list(range((segments == number).sum()))
    assert batch.segments.max() > 2


def test_left_padding_moves_tokens_and_keeps_positions(dataset):
    right, left = (dataset(RECORDS, padding_side=side).batch(0, 3) for side in ("right", "left"))
    for name in ("input_ids", "labels", "positions", "segments"):
        for first, last, real in zip(getattr(right, name), getattr(left, name), right.segments, strict=True):
            length = int((real > 0).sum())
            assert (first[:length] == last[len(last) - length :]).all()
    assert (left.positions[left.segments == 0] == 0).all()


def test_packing_loses_and_doubles_no_record(dataset):
    records = [{"instruction": f"q{i}", "output": "x " * (i % 37) + "y"} for i in range(60)]
    data = dataset(records, packing=True, sequence_tokens=100)
    assert data.rows < 40
    found = documents(data, 0, data.rows)
    assert len(found) == 60
    assert len({whole for whole, _ in found}) == 60


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seed=st.integers(0, 2**32 - 1), examples=st.integers(1, 9))
def test_order_is_a_permutation_per_epoch_whatever_the_batch_size(dataset, seed, examples):
    records = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(18)]
    data = dataset(records, seed=seed)
    whole = data.batch(0, 36).input_ids
    pieces = np.concatenate([data.batch(step, examples).input_ids for step in range(-(-36 // examples))])[:36]
    assert (whole == pieces).all()
    first, second = ({row.tobytes() for row in half} for half in (whole[:18], whole[18:]))
    assert first == second
    assert len(first) == 18


def test_the_order_changes_with_seed_and_epoch(dataset):
    records = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(18)]
    one = dataset(records, seed=1).batch(0, 36).input_ids
    two = dataset(records, seed=2).batch(0, 36).input_ids
    assert not (one == two).all()
    assert not (one[:18] == one[18:]).all()


def test_held_out_rows_come_once_in_order_and_the_rest_is_padding(dataset):
    data = dataset([{"instruction": f"q{i}", "output": f"a{i}"} for i in range(7)])
    batches = list(data.in_order(3))
    assert len(batches) == 3
    assert (batches[-1].segments[1:] == 0).all()
    assert sum(b.target_tokens for b in batches) == data.batch(0, 7).target_tokens


def test_split_keeps_the_rows_of_the_global_batch(dataset):
    parts = dataset(RECORDS).batch(0, 6).split(3)
    assert [part.rows.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]


def test_every_unusable_record_is_counted(dataset):
    records = [
        *RECORDS,
        {"instruction": "long", "output": "word " * 400},
        {"instruction": " ", "output": ""},
        {"instruction": "no answer", "output": ""},
        {"messages": [{"role": "user", "content": "anybody?"}]},
    ]
    counts, warning = dataset(records).summary.splitlines()
    assert counts.endswith("7 records make 3 pieces, 0 cut, skipped: 1 too long, 1 empty, 2 without a target")
    assert warning.startswith("warning: 1 of 7 records are longer than data.sequence_tokens=160")
    assert "make 4 pieces, 1 cut, skipped: 0 too long" in dataset(records, too_long="cut").summary
    assert dataset(records, too_long="split").rows > 10


def test_a_record_cut_inside_its_prompt_has_no_target(dataset):
    data = dataset([*RECORDS, {"instruction": "word " * 400, "output": "x"}], too_long="cut")
    assert "make 3 pieces, 1 cut" in data.summary
    assert data.summary.endswith("1 without a target")


def test_plain_text_documents(make_recipe: Make, tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_text("First document.\nStill the first.\n\nSecond one.\n \n\nThird.\n")
    data = open_dataset(make_recipe(data={"train": str(path), "task": "text"}), "train")
    assert {whole for whole, _ in documents(data, 0, 3)} == {
        "<s>First document.\nStill the first.\n</s>",
        "<s>Second one.\n</s>",
        "<s>Third.\n</s>",
    }


def test_the_cache_is_used_and_follows_the_file(make_recipe: Make, tmp_path: Path):
    path, cache = tmp_path / "d.jsonl", tmp_path / "cache"
    recipe = make_recipe(data={"train": write(path, RECORDS)})
    open_dataset(recipe, "train")
    [folder] = cache.iterdir()
    stamp = (folder / "tokens.bin").stat().st_mtime_ns
    open_dataset(recipe, "train")
    assert (folder / "tokens.bin").stat().st_mtime_ns == stamp
    write(path, RECORDS[:1])
    assert open_dataset(recipe, "train").rows == 1
    assert len(list(cache.iterdir())) == 2


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_chat_template_of_the_checkpoint(tmp_path: Path):
    messages = [
        {"role": r, "content": c}
        for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    write(tmp_path / "d.jsonl", [{"messages": messages}])
    chat = ChatTemplate(CHATML, {"bos_token": "<s>"})
    [record] = read_records(tmp_path / "d.jsonl", task="question_answering", chat=chat)
    assert [(s.text, s.counts) for s in record.segments] == [
        ("<|user|>a<|end|>\n<|assistant|>", False),
        ("b<|end|>\n", True),
        ("<|user|>c<|end|>\n<|assistant|>", False),
        ("d<|end|>\n", True),
    ]


def test_the_input_keeps_its_blank_lines(dataset):
    [(whole, _)] = documents(dataset([{"instruction": "Why?", "input": "a\n\n\nb", "output": "x"}]), 0, 1)
    assert whole == "<s>Question: Why?\na\n\n\nb\nAnswer:\nx</s>"


def test_templates_may_mark_generation_and_break_loops(tmp_path: Path):
    write(tmp_path / "d.jsonl", [RECORDS[1]])
    source = (
        "{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{{ m.role }}: "
        "{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    )
    [record] = read_records(tmp_path / "d.jsonl", task="question_answering", chat=ChatTemplate(source, {}))
    assert [(s.text, s.counts) for s in record.segments] == [
        ("user: Hi;", False),
        ("assistant: Hello.;", True),
    ]


def test_of_several_templates_the_default_one_counts(model_dirs: dict[str, Path], tmp_path: Path):
    shutil.copyfile(model_dirs["plain"] / "tokenizer.json", tmp_path / "tokenizer.json")
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    chat = read_codec(tmp_path).chat
    assert chat is not None
    assert chat.source == CHATML
    for broken, message in (
        (json.dumps({"chat_template": named[:1]}), "none called default"),
        ("[1]", "not a JSON object"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(DataError, match=message):
            read_codec(tmp_path)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path):
    write(tmp_path / "d.jsonl", [RECORDS[1]])
    chat = ChatTemplate("{{ messages | length }}{{ add_generation_prompt }}", {})
    with pytest.raises(DataError, match="line 1: the chat template rewrites"):
        list(read_records(tmp_path / "d.jsonl", task="question_answering", chat=chat))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a", "output": "b"', "line 2: not JSON"),
        ("[1]", "line 2: a record is a JSON object, not list"),
        ('{"instruction": "a"}', "line 2: no 'output'"),
        ('{"instruction": "a", "output": 3}', "line 2: 'output' must be text, not 3"),
        ('{"messages": "hi"}', "line 2: 'messages' must be a list"),
        ('{"messages": [{"role": "user"}]}', "line 2: every message needs"),
        (
            '{"messages": [{"role": "usr", "content": "x"}]}',
            "line 2: unknown role 'usr'; did you mean 'user'",
        ),
        ('{"text": "x"}', "set data.task=text"),
        ('{"prompt": "a", "completion": "b"}', "among 'prompt', 'completion'; a record has"),
    ],
)
def test_malformed_records_name_the_line(dataset, line: str, message: str):
    with pytest.raises(DataError, match=message) as caught:
        dataset([RECORDS[0], line])
    assert "\n" not in str(caught.value)


def test_no_usable_record(dataset):
    with pytest.raises(DataError, match="no usable record"):
        dataset([{"instruction": "x", "output": ""}])
    with pytest.raises(DataError, match="no usable record"):
        dataset([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "nowhere.jsonl"}, "no such file"),
        ({"sequence_tokens": 4096}, "has 512 positions"),
        ({"tokenizer": "nowhere"}, "set data.tokenizer"),
    ],
)
def test_bad_data_settings(make_recipe: Make, fields: dict, message: str):
    with pytest.raises(DataError, match=message):
        open_dataset(make_recipe(data=fields), "train")


def test_text_files_need_the_text_task(make_recipe: Make, tmp_path: Path):
    (tmp_path / "t.txt").write_text("hello\n")
    with pytest.raises(DataError, match=r"data\.task=text"):
        open_dataset(make_recipe(data={"train": str(tmp_path / "t.txt")}), "train")


def test_codec_knows_its_special_tokens(model_dirs: dict[str, Path]):
    codec = read_codec(model_dirs["plain"])
    assert (codec.pad, codec.bos, codec.eos) == (0, 1, 2)
