"""The records of a file one by one, with their locations: jsonl, JSON, plain text, tables, and what `datasets` reads."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trainspec.errors import DataError
from trainspec.tasks import TaskName
from trainspec.text.fields import BadRecord

# Read by the library `datasets`; the values are names of its builders.
TABLES = {".parquet": "parquet", ".arrow": "arrow"}
# Cells are taken as text, and an empty cell is absent.
SEPARATORS = {".csv": ",", ".tsv": "\t"}
# By which tables are separated that have one column here.
OTHER_SEPARATORS = (";", *SEPARATORS.values())
KNOWN = (".jsonl", ".json", ".txt", *SEPARATORS, *TABLES)
HUB = "hub:"


class Raw(NamedTuple):
    """A record before it is parsed: its location, and a line of JSON or a value; bytes are a line that is not UTF-8.

    `end` is the offset of the end of the record in the file, in bytes.
    """

    where: str
    content: Any
    is_json: bool
    end: int = 0

    def value(self) -> Any:
        """The record. Raises BadRecord for what is not JSON, or cannot be encoded in UTF-8."""
        if isinstance(self.content, bytes):
            raise BadRecord(_not_utf8(self.content))
        if not self.is_json:
            _refuse_surrogates(self.content)
            return self.content
        try:
            value = json.loads(self.content.rstrip())
        except json.JSONDecodeError as error:
            raise BadRecord(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
        except RecursionError:
            raise BadRecord("cannot be read: lists or objects are nested too deep") from None
        except ValueError as error:  # a number of thousands of digits
            raise BadRecord(f"cannot be read: {error}") from None
        if "\\ud" in self.content or "\\uD" in self.content:
            _refuse_surrogates(value)
        return value


def is_hub(source: str) -> bool:
    """Whether a source is `hub:ORG/NAME[:SPLIT]`."""
    return source.startswith(HUB)


def check_source(source: str, task: TaskName) -> None:
    """Raises DataError where `source` does not exist or is of an unsupported kind."""
    if is_hub(source):
        return
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"{source}: no such file; data.train and data.heldout name a file ({', '.join(KNOWN)}), a directory that "
            "`datasets` saved, or hub:ORG/NAME"
        )
    if path.is_dir():
        _check_saved(path)
        return
    if path.suffix not in KNOWN:
        raise DataError(
            f"{source}: {path.suffix or 'no ending'} is not supported; known here: {', '.join(KNOWN)}"
        )
    if path.suffix == ".txt" and task != "text":
        raise DataError(f"{source}: a .txt file holds plain text; set data.task=text, or give a .jsonl file")


def read_raw(source: str) -> Iterator[Raw]:
    """Every record, in order. jsonl and text files are read lazily, a JSON array as a whole."""
    path = Path(source)
    try:
        if is_hub(source) or path.is_dir() or path.suffix in TABLES:
            # In a table every record has every field, and null means absent.
            yield from (Raw(f"row {i}", _without_nulls(row), False) for i, row in enumerate(table(source)))
        elif path.suffix in SEPARATORS:
            yield from _cells(path, SEPARATORS[path.suffix])
        elif path.suffix == ".txt":
            yield from _documents(path)
        elif path.suffix == ".json" and (array := _array(path)) is not None:
            yield from (Raw(f"record {i}", record, False) for i, record in enumerate(array, 1))
        else:
            yield from _lines(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None


def _lines(path: Path) -> Iterator[Raw]:
    end, seen = 0, False
    _refuse_utf16(path)
    # Read as bytes, so that the progress is known; a byte-order mark is dropped.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            end += len(line)
            text = _decoded(number, line)
            if text.strip():
                if not seen and path.suffix == ".jsonl" and _begins_array(text):
                    raise DataError(f"{path}: a JSON array, not a record in each line; name it .json")
                seen = True
                yield Raw(f"line {number}", text, True, end)


def _decoded(number: int, line: bytes) -> str | bytes:
    """The text of a line; the line itself where it is not UTF-8."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        return line


def _begins_array(text: str | bytes) -> bool:
    """Whether a file's first line is an array of records, or the beginning of one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text.strip() in ("[", "[{")
    return isinstance(found, list) and bool(found) and all(isinstance(record, dict) for record in found)


def _refuse_utf16(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{path}: UTF-16 text; save it as UTF-8")


def _is_one_object(text: str) -> bool:
    """Whether a text is one JSON object over several lines."""
    if len(text.strip().splitlines()) < 2:
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _not_utf8(line: bytes) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason} at byte {error.start} of the line)"
    raise AssertionError("it is UTF-8")


def _without_nulls(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_nulls(item) for key, item in value.items() if item is not None}
        case list():
            return [_without_nulls(item) for item in value]
    return value


def _cells(path: Path, separator: str) -> Iterator[Raw]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=separator, strict=True)
        try:
            names = list(reader.fieldnames or ())
            others = [
                other for other in OTHER_SEPARATORS if other != separator and other in "".join(names[:1])
            ]
            if len(names) == 1 and others:
                named = {theirs: suffix for suffix, theirs in SEPARATORS.items()}.get(others[0])
                way_out = f"; name it {named}" if named else ""
                raise DataError(
                    f"{path}: one column, {names[0]!r}; cells are separated by {separator!r}, not by {others[0]!r}{way_out}"
                )
            for row in reader:
                where = f"line {reader.line_num}"
                if None in row:
                    raise DataError(
                        f"{path} {where}: more cells than the {len(names)} columns of the first line"
                    )
                yield Raw(where, {name: cell for name, cell in row.items() if cell}, False)
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: cannot be read: {error}") from None


def _documents(path: Path) -> Iterator[Raw]:
    """Documents separated by blank lines."""
    block: list[str] = []
    first, end = 1, 0
    _refuse_utf16(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = _decoded(number, line)
            if isinstance(text, bytes):
                raise DataError(f"{path} line {number}: {_not_utf8(line)}; save it as UTF-8")
            text = text.replace("\r\n", "\n")
            if text.strip():
                first = first if block else number
                block.append(text.rstrip("\n") + "\n")
            elif block:
                yield Raw(f"line {first}", {"text": "".join(block)}, False, end)
                block = []
            end += len(line)
    if block:
        yield Raw(f"line {first}", {"text": "".join(block)}, False, end)


def _array(path: Path) -> list[Any] | None:
    """The records of a JSON array; None where the file is lines of JSON."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        if _is_one_object(text):
            raise DataError(f"{path}: a JSON object, not an array of records; give the list that is in it")
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # Also reached by a file of lines that are arrays.
        raise DataError(f"{path}: not a JSON array of records: {error or 'nested too deep'}") from None


def table(source: str) -> Any:
    """A table that the library `datasets` reads. Raises DataError where it is not installed or cannot read it."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: read by the library datasets, which is not installed; pip install 'twintrain[datasets]'"
        ) from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it raises is reported
    path = Path(source)
    try:
        if is_hub(source):
            name, _, split = source.removeprefix(HUB).partition(":")
            return datasets.load_dataset(name, split=split or "train")
        if path.is_dir():
            loaded = datasets.load_from_disk(source)
            if isinstance(loaded, datasets.DatasetDict):
                raise DataError(
                    f"{source}: holds several splits; name one: {', '.join(f'{source}/{k}' for k in loaded)}"
                )
            return loaded
        return datasets.load_dataset(TABLES[path.suffix], data_files=source, split="train")
    except DataError:
        raise
    except Exception as error:  # its readers raise errors of every kind
        raise DataError(f"{source}: datasets cannot read it: {_one_line(error)}") from None


def _check_saved(directory: Path) -> None:
    """Raises DataError for a directory that `datasets` did not save, naming the files in it that can be read."""
    if (directory / "state.json").exists() or (directory / "dataset_dict.json").exists():
        return
    files = sorted(str(path) for path in directory.iterdir() if path.is_file() and path.suffix in KNOWN)
    there = f"name a file in it, such as {files[0]}" if files else f"name a file ({', '.join(KNOWN)})"
    raise DataError(f"{directory}: a directory that `datasets` did not save; {there}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _refuse_surrogates(value: Any) -> None:
    match value:
        case str():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise BadRecord(
                    f"half of a surrogate pair ({value[error.start]!a}), which is not text; remove it"
                ) from None
        case dict():
            for key, item in value.items():
                _refuse_surrogates(key)
                _refuse_surrogates(item)
        case list():
            for item in value:
                _refuse_surrogates(item)
