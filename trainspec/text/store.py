"""The token cache: the records of a file, tokenised once, memory-mapped, keyed by everything that determines them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainspec.errors import DataError, nearest
from trainspec.files.hf import tokenizer_files
from trainspec.recipe import Data
from trainspec.text.files import check_source, is_hub
from trainspec.text.process import ask, versions
from trainspec.text.prompt_file import read_prompt
from trainspec.text.records import FIELDS

CACHE_FORMAT = 5
# Bits of a token's mark: it is a target; a turn begins with it.
COUNTS, TURN = 1, 2


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's directory and a chat template to replace its own, identified by content; nothing is loaded."""

    directory: Path
    template: str | None
    date: str

    def files(self) -> list[Path]:
        """Its files, relative to the directory. Raises DataError where it has none."""
        if files := tokenizer_files(self.directory):
            return files
        raise DataError(f"{self.directory}: has no tokenizer; set data.tokenizer to a directory that has one")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's files and of the replacing template."""
        contents = [
            item for f in self.files() for item in (str(f).encode(), (self.directory / f).read_bytes())
        ]
        return _digest(*contents, repr(self.template).encode(), self._class_in_config().encode())

    def _class_in_config(self) -> str:
        """The settings of `config.json` by which transformers chooses the tokenizer's class."""
        try:
            config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        is_object = isinstance(config, dict)
        return repr([config.get(k) for k in ("model_type", "tokenizer_class")]) if is_object else ""

    def encode(self, text: str, cache: Path) -> list[int]:
        """The ids of `text`, with the special tokens that the tokenizer itself adds."""
        key = _digest(self.digest.encode(), text.encode(), versions().encode())
        file = cache / "texts" / f"{key[:20]}.json"
        if not file.is_file():
            ids = ask(do="encode", text=text, **self._asked)
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(ids), encoding="utf-8")
            temporary.rename(file)
        return json.loads(file.read_text(encoding="utf-8"))

    @property
    def _asked(self) -> dict[str, Any]:
        return {"tokenizer": str(self.directory), "date": self.date, "digest": self.digest}

    def pieces(self, sequences: list[list[int]]) -> list[tuple[list[str], str]]:
        """The vocabulary pieces and the text of each sequence of ids."""
        answers = ask(do="pieces", ids=sequences, **self._asked)
        return [(pieces, text) for pieces, text in answers]

    def said(self, sequences: list[list[int]]) -> list[str]:
        """The text of each sequence of ids, without special tokens."""
        return ask(do="said", ids=sequences, **self._asked)

    def prompts(
        self,
        texts: Sequence[str],
        source: str | None,
        data: Data,
        *,
        as_trained: bool = False,
        first: int | None = None,
        stop: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The prompts of `texts`, or of a file's records or the `first` of them, as the data's task and template write them.

        Every record must be a prompt; `as_trained` leaves out those that training does: empty ones, and as `data.bad_records` says.

        `prompts` are objects with `number`, which counts the records from 1, `prompt`, `ids`, `reference` (None where there is
        none), `references` (all that are right, the reference first) and `choices`, objects with `text`, `ids` (prompt, choice and
        end token as training has them) and `first`, the number of the first of `ids` that counts. `left_out` are the records that
        are no prompts, objects with `number` and `why`.
        `records` is how many there are in all. `stops` are the ids that end a response, with those of `stop` that are special tokens.
        Raises DataError.
        """
        return ask(
            do="prompts",
            texts=list(texts),
            source=source,
            like=None if is_hub(data.train) else data.train,
            task=data.task,
            columns=data.columns,
            ignore=sorted(data.ignore),
            system=data.system,
            prompt=read_prompt(data),
            as_trained=as_trained,
            first=first,
            stop=list(stop),
            bad_records=data.bad_records,
            chat_template=self.template,
            **self._asked,
        )


@dataclass(frozen=True)
class TokenStore:
    """All records of one file, concatenated. Record i is tokens[offsets[i]:offsets[i + 1]].

    `marks` has one byte per token, with the bits COUNTS and TURN; `about` has counts and notes from tokenising.
    """

    tokens: NDArray[np.int32]
    marks: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    about: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of tokens, marks and offsets."""
        return _digest(*(np.ascontiguousarray(a).data for a in (self.tokens, self.marks, self.offsets)))

    def special(self, name: str) -> int | None:
        """The id of `bos`, `eos`, `pad` or `unk`; None where the tokenizer has none."""
        return self.about["special_tokens"].get(name, (None, None))[1]


def find_tokenizer(data: Data, directory: Path | None, model: str) -> Tokenizer:
    """The tokenizer of a recipe: `data.tokenizer`, or the model's. Raises DataError where neither exists."""
    home = Path(data.tokenizer) if data.tokenizer else directory
    if home is None:
        raise DataError(f"data.tokenizer: {model} has no tokenizer; name a directory that has one")
    if not home.is_dir():
        raise DataError(f"{home}: no such directory; set data.tokenizer to one that has a tokenizer")
    return Tokenizer(home, read_template(data.chat_template), data.date.isoformat())


def read_template(file: str | None) -> str | None:
    """The text of the chat template `file`, `data.chat_template`. Raises DataError where it cannot be read."""
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"data.chat_template: no file {file}; give a jinja file") from None
    except IsADirectoryError:
        raise DataError(f"data.chat_template: {file} is a directory; give a jinja file") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.chat_template: {file}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None


def check_tokens(source: str, tokenizer: Tokenizer, data: Data) -> None:
    """Raises DataError for what is wrong with a source, its columns or its tokenizer before a record is read."""
    check_source(source, data.task)
    for name, _ in data.columns:
        if name not in FIELDS:
            raise DataError(f"data.columns.{name}: no field of a record has that name{nearest(name, FIELDS)}")
    doubled = [theirs for _, theirs in data.columns if [t for _, t in data.columns].count(theirs) > 1]
    if doubled:
        raise DataError(f"data.columns: two fields of ours cannot both come from {doubled[0]!r}")
    read_prompt(data)
    tokenizer.files()


def tokenise(source: str, tokenizer: Tokenizer, data: Data) -> TokenStore:
    """The tokens of a source, from the cache if it is there. Raises DataError."""
    check_tokens(source, tokenizer, data)
    settings = {
        "task": data.task,
        "columns": data.columns,
        "ignore": sorted(data.ignore),
        "bad_records": data.bad_records,
        "system": data.system,
        "prompt": read_prompt(data),
        "date": data.date.isoformat(),
    }
    about = (CACHE_FORMAT, settings, versions(), Path(source).suffix)
    key = _digest(repr(about).encode(), _content(source).encode(), tokenizer.digest.encode())
    folder = Path(data.cache) / key[:20]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.is_dir():  # not made by another process meanwhile
                job = {
                    "source": source,
                    "tokenizer": str(tokenizer.directory),
                    "digest": tokenizer.digest,
                    "chat_template": tokenizer.template,
                }
                _fill(folder, settings | job)
    return TokenStore(
        tokens=_map(folder / "tokens.bin", np.dtype(np.int32)),
        marks=_map(folder / "marks.bin", np.dtype(np.uint8)),
        offsets=np.load(folder / "offsets.npy", allow_pickle=False),
        about=json.loads((folder / "about.json").read_text(encoding="utf-8")),
    )


def _content(source: str) -> str:
    """A digest of a source's content: of its bytes, or, for the hub, `datasets`' fingerprint."""
    path = Path(source)
    if is_hub(source):
        return ask(do="identify", source=source, online=True)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file())
        return _digest(*(f"{f.relative_to(path)} {_sha256(f)}".encode() for f in files))
    return _sha256(path)


def _fill(folder: Path, job: dict[str, Any]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=".filling-", dir=folder.parent))
    try:
        about = ask(do="fill", folder=str(temporary), online=is_hub(job["source"]), **job)
        (temporary / "about.json").write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:  # without file locks another process may be faster; its cache is the same
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time, if the file system has locks; a lock ends with its process."""
    with file.open("w", encoding="utf-8") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(*contents: bytes | memoryview) -> str:
    total = hashlib.sha256()
    for content in contents:
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()
