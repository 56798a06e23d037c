"""Records as token ids: tokenised once into a memory-mapped cache, keyed by file, tokenizer, template and task."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from trainspec.errors import DataError
from trainspec.records import PROMPTS, ChatTemplate, Rendered, Task, read_records

CACHE_FORMAT = 2
CHUNK_RECORDS = 1024


@dataclass(frozen=True)
class TextCodec:
    """A tokenizer with its special tokens, read from a Hugging Face directory; plain JSON only."""

    tokenizer: Tokenizer
    bos: int | None
    eos: int | None
    pad: int
    chat: ChatTemplate | None
    digest: str

    def decode(self, ids: NDArray[np.int32]) -> str:
        """The text of `ids`, special tokens shown."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with the special tokens that the tokenizer itself puts around it."""
        return self.tokenizer.encode(text).ids


@dataclass(frozen=True)
class TokenStore:
    """All records of one file, end to end. Record i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: NDArray[np.int32]
    counts: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    num_empty: int

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        return _digest(self.tokens.tobytes(), self.counts.tobytes(), self.offsets.tobytes())


def read_codec(directory: Path) -> TextCodec:
    """The tokenizer of a Hugging Face directory. Raises DataError where there is none."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path}: missing; set data.tokenizer to a directory that has one")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise DataError(f"{path}: not a tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = _json(directory / "tokenizer_config.json")
    special = {k: _token(config.get(k)) for k in ("bos_token", "eos_token", "pad_token")}
    ids = {k: tokenizer.token_to_id(v) if v else None for k, v in special.items()}
    template = _chat_source(directory, config)
    chat = ChatTemplate(template, {k: v or "" for k, v in special.items()}) if template else None
    digest = _digest(path.read_bytes(), json.dumps(special).encode(), (template or "").encode())
    pad = next((i for i in (ids["pad_token"], ids["eos_token"]) if i is not None), 0)
    return TextCodec(tokenizer, ids["bos_token"], ids["eos_token"], pad, chat, digest)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content


def _token(value: object) -> str | None:
    # A special token is written plainly or as an object with its content.
    return value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None


def _chat_source(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if template is None:
            raise DataError(
                f"{directory}: several chat templates and none called default; keep the one to train with"
            )
    return template if isinstance(template, str) else None


def tokenise(path: Path, codec: TextCodec, *, task: Task, cache: Path) -> TokenStore:
    """The tokens of a file, from the cache where an equal file was tokenised equally before."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; data.train and data.heldout name a .jsonl or .txt file")
    key = _digest(
        repr(PROMPTS).encode(),
        path.read_bytes(),
        codec.digest.encode(),
        f"{task} {path.suffix} {CACHE_FORMAT}".encode(),
    )
    folder = cache / key[:20]
    if not folder.is_dir():
        _fill(folder, path, codec, task)
    return TokenStore(
        tokens=_map(folder / "tokens.bin", np.dtype(np.int32)),
        counts=_map(folder / "counts.bin", np.dtype(np.bool_)),
        offsets=np.load(folder / "offsets.npy", allow_pickle=False),
        num_empty=json.loads((folder / "about.json").read_text())["num_empty"],
    )


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _fill(folder: Path, path: Path, codec: TextCodec, task: Task) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".filling-", dir=folder.parent))
    try:
        num_empty, lengths = 0, [0]
        with (temporary / "tokens.bin").open("wb") as tokens, (temporary / "counts.bin").open("wb") as counts:
            records = read_records(path, task=task, chat=codec.chat)
            while chunk := list(islice(records, CHUNK_RECORDS)):
                full = [r for r in chunk if not r.empty]
                num_empty += len(chunk) - len(full)
                for ids, mask in _encode(full, codec):
                    tokens.write(np.asarray(ids, np.int32).tobytes())
                    counts.write(np.asarray(mask, np.bool_).tobytes())
                    lengths.append(len(ids))
        np.save(temporary / "offsets.npy", np.cumsum(lengths, dtype=np.int64))
        (temporary / "about.json").write_text(
            json.dumps({"file": str(path), "task": task, "num_empty": num_empty}) + "\n"
        )
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was quicker; its cache is the same
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encode(records: list[Rendered], codec: TextCodec) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of each record and whether each counts. Segments are tokenised one by one, so that no token
    straddles what counts and what does not."""
    texts = [s.text for r in records for s in r.segments]
    encodings = iter(codec.tokenizer.encode_batch(texts, add_special_tokens=False))
    for record in records:
        ids: list[int] = []
        mask: list[bool] = []
        if codec.bos is not None and not record.closed:
            ids, mask = [codec.bos], [False]
        for segment in record.segments:
            piece = next(encodings).ids
            ids += piece
            mask += [segment.counts] * len(piece)
        # The end token is learnt only where something before it is: a record whose response is empty teaches nothing.
        if codec.eos is not None and not record.closed:
            ids.append(codec.eos)
            mask.append(record.segments[-1].counts and bool(mask) and mask[-1])
        yield ids, mask


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()
