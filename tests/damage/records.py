"""Records: lines and arrays of JSON, plain text, tables, and the settings that say how they are read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import yaml

from damage.case import Case, Tree, Whole
from damage.recipes import recipe_tree
from damage.tokenizers import SPOKEN
from damage.values import damage_bytes, damage_text, damage_values, json_text, written

_CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}
_TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "of a town", "parameters": {"type": "object"}},
}
_MANY = {
    "messages": [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]},
        {"role": "assistant", "content": None, "tool_calls": [_CALL], "reasoning_content": "hm"},
        {"role": "tool", "content": "dry", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "It is dry.", "weight": 1},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye.", "train": False},
    ],
    "tools": [_TOOL],
}  # fmt: skip
RECORDS: tuple[tuple[str, Tree], ...] = (
    ("question_answering", {"instruction": "Name a fruit.", "input": "", "output": "A pear.", "system": "Be short."}),
    ("translation", {"instruction": "Into German", "input": "a pear", "output": "eine Birne"}),
    ("question_answering", _MANY),
    ("question_answering", _MANY | {"tools": json.dumps([_TOOL])}),
    ("question_answering", SPOKEN[1]),
    ("question_answering", {"conversations": [
        {"from": "system", "value": "Be short."}, {"from": "human", "value": "Rome?"},
        {"from": "function_call", "value": json.dumps(_CALL["function"])}, {"from": "observation", "value": "dry"},
        {"from": "gpt", "value": "It is dry."}], "tools": [_TOOL]}),
    ("question_answering", {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}),
    ("question_answering", {"prompt": "Name a fruit.", "completion": " A pear."}),
    ("text", {"text": "Once upon a time there was a pear.\nIt was green."}),
)  # fmt: skip
RECORD_KEYS = (
    "messages", "role", "content", "tools", "tool_calls", "weight", "train", "system", "input", "history", "name", "id", "from",
    "value", "prompt", "completion", "text", "instruction", "output", "conversations", "function", "arguments", "type",
)  # fmt: skip


def damage_records(folder: Path, rng: random.Random, whole: Whole) -> Case:
    """Lines and arrays of JSON, plain text, and the settings that say how they are read."""
    task, record = rng.choice(RECORDS)
    records = [damage_values(record, rng, keys=RECORD_KEYS) for _ in range(rng.randint(1, 4))]
    records[rng.randrange(len(records)) : 0] = [record] * rng.choice((0, 1, 1))
    ending, content = ".jsonl", "".join(json_text(r, rng).replace("\n", " ") + "\n" for r in records)
    match rng.randrange(8):
        case 0:
            ending, content = ".json", json_text(records, rng)
        case 1:
            ending = ".json"
        case 2 | 3 | 4 if task == "text":
            ending, content = ".txt", damage_text(record["text"] * 2, rng)
        case 5:
            content = damage_text(content, rng)
        case _:
            pass
    file = folder / f"d{ending}"
    file.write_bytes(written(content, rng))
    return _read(folder, rng, whole, file, task)


def damage_table(folder: Path, rng: random.Random, whole: Whole) -> Case:
    """What the library `datasets` reads: parquet, csv and tsv."""
    task, record = rng.choice([(t, r) for t, r in RECORDS if all(isinstance(v, str) for v in r.values())])
    rows = [record] * 3
    ending = rng.choice(("parquet", "csv", "tsv"))
    file = folder / f"d.{ending}"
    if ending == "parquet":
        columns = {key: [rng.choice((row[key], None)) for row in rows] for key in record}
        columns[rng.choice(sorted(columns))] = rng.choice(
            ([1, 2, 3], [0.5, None, 1.0], [[1], [], [2]], [b"\xff", b"", b"x"])
        )
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        if rng.random() < 0.5:
            file.write_bytes(damage_bytes(file.read_bytes(), rng))
    else:
        separator = "," if ending == "csv" else "\t"
        lines = [record.keys(), *(row.values() for row in rows)]
        content = "".join(separator.join(map(json.dumps, line)) + "\n" for line in lines)
        file.write_bytes(written(damage_text(content, rng), rng))
    return _read(folder, rng, whole, file, task)


def _read(folder: Path, rng: random.Random, whole: Whole, file: Path, task: str) -> Case:
    """A case of `data`, with settings at random."""
    settings: Tree = {"task": task}
    for name, values in {
        "bad_records": ("stop", "skip", "skip"),
        "too_long": ("skip", "cut", "split"),
        "packing": (False, True),
        "padding_side": ("right", "left"),
        "loss_on": ("completion", "all"),
        "system": (None, None, None, "Be kind."),
        "ignore": ([], [], ["id", "history", "new"]),
        "columns": ({}, {}, {"input": "new"}),
        "sequence_tokens": (64, 256, 1),
    }.items():
        settings[name] = rng.choice(values)
    home = rng.choice((whole.model, whole.chat))
    tree = recipe_tree(whole, rng, train=str(file), tokenizer=str(home)) | {"method": {"kind": "lora"}}
    tree["data"] |= settings
    (folder / "r.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return Case(["data", str(folder / "r.yaml")], source=file)
