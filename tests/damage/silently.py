"""What a command took for another value than its input has, or for a value of another type: nothing may be."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from damage.case import ADAPTERS, CHATML, MODEL, Case
from trainspec.data import open_dataset
from trainspec.date import DATE
from trainspec.files.model_config import read_model_spec
from trainspec.recipe import DEFAULT_STEPS, load_recipe, recipe_from
from trainspec.recipe_file import read_tree
from trainspec.runs.run import resolve
from trainspec.text.fields import BadRecord
from trainspec.text.files import read_raw
from trainspec.text.records import Reader, Text

# The settings of config.json that the judge compares, and the fields of a ModelSpec that they are.
CONFIGURED = {
    "vocab_size": "vocab",
    "hidden_size": "embed",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "mlp",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_positions",
    "tie_word_embeddings": "tied_embeddings",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "initializer_range": "init_std",
}


def taken_silently(case: Case, code: object, out: str) -> Iterator[str]:
    """A complaint for every such value; `code` and `out` are how the case's command ended and what it printed."""
    if case.argv[0] == "show" and out:
        yield from _not_as_written(case, out)
    if code == 0 and case.tokenizer is not None:
        yield from _not_as_transformers(case)
    if code == 0 and case.config is not None:
        yield from _not_as_configured(case.config)
    if code == 0 and case.adapter is not None:
        yield from _not_the_adapter(*case.adapter)
    if code == 0 and case.source is not None:
        yield from _not_a_record(case)


def _not_as_configured(file: Path) -> Iterator[str]:
    """Every setting of an accepted config.json has to be that of the model, of its type."""
    config, model = json.loads(file.read_text()), read_model_spec(file.parent)
    for key, name in CONFIGURED.items():
        given, taken = config.get(key), getattr(model, name)
        is_as_given = _is_number(given, taken) and float(given) == float(taken)
        is_as_given = is_as_given or (type(given) is type(taken) and given == taken)
        if given is not None and not is_as_given:
            yield f"{key} is {given!r:.200}, taken as {taken!r}"


def _not_the_adapter(name: str, file: Path) -> Iterator[str]:
    """An accepted adapter_config.json says what that of the adapter said, or leaves out what is a default."""
    config = json.loads(file.read_text())
    plain = ADAPTERS[name].peft_config(MODEL)
    decisive = {
        "lora": ("peft_type", "r", "lora_alpha", "use_rslora", "bias", "fan_in_fan_out"),
        "prefix": ("peft_type", "num_virtual_tokens", "num_layers", "num_attention_heads"),
        "prompt": ("peft_type", "num_virtual_tokens"),
    }
    for key in decisive[name]:
        given, right = config.get(key), plain[key]
        is_as_meant = given == right and (type(given) is type(right) or _is_number(given, right))
        if given and not is_as_meant:
            yield f"{key} is {given!r:.200}, taken as {right!r}"


def _not_a_record(case: Case) -> Iterator[str]:
    """Of every record that is read, what a template gets has to be text, or an object where it is a call."""
    data = load_recipe(Path(case.argv[1])).data
    reader = Reader(data.task, dict(data.columns), frozenset(data.ignore), data.system)
    for raw in read_raw(str(case.source)):
        try:
            record = reader.read(raw.value(), lambda _: CHATML)
        except BadRecord:
            continue
        if isinstance(record, Text):
            wrong = [text for text, _ in record.stretches if not isinstance(text, str)]
        else:
            calls = [call.get("function", call) for m in record.messages for call in m.get("tool_calls", ())]
            texts = [v for m in record.messages for k, v in m.items() if k != "tool_calls"]
            wrong = [v for v in [*texts, *(c["name"] for c in calls)] if not isinstance(v, str)]
            wrong += [c["arguments"] for c in calls if not isinstance(c["arguments"], dict)]
        if wrong:
            yield f"{raw.where}: {wrong[0]!r:.200} is taken as it is"


def _is_number(*values: object) -> bool:
    return all(type(value) in (int, float) for value in values)


def _not_as_written(case: Case, out: str) -> Iterator[str]:
    """The printed recipe has to be the one that was written, value by value."""
    overrides = case.argv[3::2]
    printed = yaml.safe_load(
        "".join(line for line in out.splitlines(keepends=True) if not line.startswith("# "))
    )
    if recipe_from(printed) != load_recipe(Path(case.argv[1]), overrides):
        yield "the printed recipe is another one"
    yield from _differences(read_tree(Path(case.argv[1]), overrides), printed, "")


def _differences(given: Any, printed: Any, where: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(printed, dict):
        for key, value in given.items():
            if key not in printed:
                yield f"{where}.{key} is not in the printed recipe"
            else:
                yield from _differences(value, printed[key], f"{where}.{key}")
    elif isinstance(given, list) and isinstance(printed, list):
        if len(given) != len(printed):
            yield f"{where}: {given!r:.200} is printed as {printed!r:.200}"
        for one, other in zip(given, printed, strict=False):
            yield from _differences(one, other, where)
    else:
        if isinstance(given, datetime.date):
            given = given.isoformat()
        is_number = _is_number(given, printed)
        # A length that is not given is there by default.
        is_default = given is None and where == ".run.steps" and printed == DEFAULT_STEPS
        is_same = (type(given) is type(printed) or is_number) and given == printed
        if not (is_same or is_default):
            yield f"{where}: {given!r:.200} is printed as {printed!r:.200}"


def _not_as_transformers(case: Case) -> Iterator[str]:
    """The ids of every record that became tokens have to be those that transformers gives one of the records."""
    from transformers import AutoTokenizer  # slow to import, so only where a tokenizer was accepted

    assert case.records is not None
    data = open_dataset(resolve(load_recipe(Path(case.argv[1]))), "train")
    try:
        tokenizer = AutoTokenizer.from_pretrained(case.tokenizer)
    except Exception as error:
        yield f"accepted, and transformers says {error!r:.500}"
        return
    if case.template is not None:
        tokenizer.chat_template = case.template.read_text(encoding="utf-8-sig")
    records = [json.loads(line) for line in case.records.read_text().splitlines()]
    theirs = [_ids(tokenizer, record) for record in records]
    for number in range(data.records):
        mine = data.record(number)[0].tolist()
        if not any(_is_same(tokenizer, mine, ids) for ids in theirs):
            yield f"record {number} has the ids {mine}, of transformers' {theirs!r:.1500}"


class _Clock(datetime.datetime):
    """What templates see of the day."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.datetime.combine(DATE, datetime.time(), tz)


def _ids(tokenizer: Any, record: dict[str, Any]) -> list[int] | None:
    """What transformers makes of a record; None where it makes nothing of it."""
    if "prompt" in record:
        return tokenizer(record["prompt"] + record["completion"])["input_ids"]
    if tokenizer.chat_template is None:  # written as text, in a way that is not transformers'
        text = "".join(f"{m['role'].capitalize()}:\n{m['content'].strip()}\n" for m in record["messages"])
        return tokenizer(text)["input_ids"]
    try:
        with mock.patch("transformers.utils.chat_template_utils.datetime", _Clock):
            return tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=False)
    except Exception:
        return None


def _is_same(tokenizer: Any, mine: list[int], theirs: list[int] | None) -> bool:
    """Up to begin tokens that are there twice, and the end token that a text gets."""
    return theirs is not None and _bare(tokenizer, mine) == _bare(tokenizer, theirs)


def _bare(tokenizer: Any, ids: list[int]) -> list[int]:
    start, stop = 0, len(ids)
    while start < stop and ids[start] == tokenizer.bos_token_id:
        start += 1
    while start < stop and ids[stop - 1] == tokenizer.eos_token_id:
        stop -= 1
    return ids[start:stop]
