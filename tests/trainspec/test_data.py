import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainspec.data import IGNORED, Dataset, open_dataset
from trainspec.errors import DataError
from trainspec.recipe import Recipe
from trainspec.runs.run import resolve

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
        return open_dataset(resolve(make_recipe(data=data, run={"seed": seed})), "train")

    return make


def documents(data: Dataset, step: int, examples: int) -> list[tuple[str, str]]:
    """(whole text, text that counts) of every document of a batch."""
    batch = data.batch(step, examples)
    found = []
    for i in range(examples):
        for number in range(1, batch.segments[i].max() + 1):
            at = batch.segments[i] == number
            counted = at & (batch.labels[i] != IGNORED)
            found += [batch.input_ids[i, at], batch.input_ids[i, counted]]
    texts = [text for _, text in data.pieces(found)]
    return list(zip(texts[::2], texts[1::2], strict=True))


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
    assert data.num_examples < 40
    found = documents(data, 0, data.num_examples)
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
    counts, warning, *_ = dataset(records).summary.splitlines()
    assert "7 records make 3 segments in 3 examples of 160 tokens" in counts
    assert counts.endswith("1 too long (skipped); skipped: 1 empty, 2 without a target")
    assert re.search(r"^warning: \d\d % of the tokens are lost, in 1 records longer than", warning)
    assert "make 4 segments" in dataset(records, too_long="cut").summary
    assert "1 too long (cut)" in dataset(records, too_long="cut").summary
    assert dataset(records, too_long="split").num_examples > 10


def test_a_record_cut_inside_its_prompt_has_no_target(dataset):
    data = dataset([*RECORDS, {"instruction": "word " * 400, "output": "x"}], too_long="cut")
    assert "make 3 segments" in data.summary
    assert "1 too long (cut); skipped: 1 without a target" in data.summary


def test_plain_text_documents(make_recipe: Make, tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_text("First document.\nStill the first.\n\nSecond one.\n \n\nThird.\n")
    data = open_dataset(resolve(make_recipe(data={"train": str(path), "task": "text"})), "train")
    assert {whole for whole, _ in documents(data, 0, 3)} == {
        "<s>First document.\nStill the first.\n</s>",
        "<s>Second one.\n</s>",
        "<s>Third.\n</s>",
    }


def test_the_cache_is_used_and_follows_the_file(make_recipe: Make, tmp_path: Path):
    path, cache = tmp_path / "d.jsonl", tmp_path / "cache"
    recipe = make_recipe(data={"train": write(path, RECORDS), "cache": str(cache)})
    open_dataset(resolve(recipe), "train")
    [folder] = cache.iterdir()
    stamp = (folder / "tokens.bin").stat().st_mtime_ns
    open_dataset(resolve(recipe), "train")
    assert (folder / "tokens.bin").stat().st_mtime_ns == stamp
    write(path, RECORDS[:1])
    assert open_dataset(resolve(recipe), "train").num_examples == 1
    assert len(list(cache.iterdir())) == 2


def test_the_input_keeps_its_blank_lines(dataset):
    [(whole, _)] = documents(dataset([{"instruction": "Why?", "input": "a\n\n\nb", "output": "x"}]), 0, 1)
    assert whole == "<s>Question: Why?\na\n\n\nb\nAnswer:\nx</s>"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a", "output": "b"', "line 2: not JSON"),
        ("[1]", "line 2: a record is a JSON object, not a list"),
        ('{"instruction": "a"}', "line 2: 'instruction' without 'output'"),
        ('{"instruction": "a", "output": 3}', "line 2: 'output' must be text, not 3"),
        ('{"messages": "hi"}', "line 2: 'messages' must be a list"),
        ('{"messages": [{"role": "user"}]}', "line 2: every message needs"),
        (
            '{"messages": [{"role": "usr", "content": "x"}]}',
            "line 2: unknown role 'usr'; did you mean 'user'",
        ),
        ('{"text": "x"}', "set data.task=text"),
        ('{"question": "a", "answer": "b"}', r"data\.columns=\{instruction: question, output: answer\}"),
        ('{"instruction": "a", "output": "b", "context": "c"}', r"data\.columns=\{input: context\}"),
        (
            '{"instruction": "a", "output": "b", "messages": []}',
            "line 2: fields 'instruction', 'output' are not used",
        ),
        ('{"instruction": "a", "output": "b", "history": []}', "data.ignore"),
    ],
)
def test_malformed_records_name_the_line(dataset, line: str, message: str):
    with pytest.raises(DataError, match=message) as caught:
        dataset([RECORDS[0], line])
    assert "\n" not in str(caught.value)


def test_no_usable_record(dataset):
    with pytest.raises(DataError, match="no usable record"):
        dataset([{"instruction": "x", "output": ""}])
    with pytest.raises(DataError, match="has no record; give one in each line"):
        dataset([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "nowhere.jsonl"}, "no such file"),
        ({"sequence_tokens": 4096}, "has 512 positions"),
        ({"tokenizer": "nowhere"}, "set data.tokenizer"),
        ({"columns": {"instructon": "question"}}, "did you mean 'instruction'"),
        ({"chat_template": "nowhere.jinja"}, "data.chat_template: no file"),
    ],
)
def test_bad_data_settings(make_recipe: Make, fields: dict, message: str):
    with pytest.raises(DataError, match=message):
        open_dataset(resolve(make_recipe(data=fields)), "train")


def test_text_files_need_the_text_task(make_recipe: Make, tmp_path: Path):
    (tmp_path / "t.txt").write_text("hello\n")
    with pytest.raises(DataError, match=r"data\.task=text"):
        open_dataset(resolve(make_recipe(data={"train": str(tmp_path / "t.txt")})), "train")
