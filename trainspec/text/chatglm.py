"""Records as ChatGLM2's token ids, by its SentencePiece model and the prompt that it was trained with. Used by the worker only.

Of the directory `tokenizer.model` is read and no code is run. What the model has besides pieces follows them:
[MASK], [gMASK], [sMASK], sop, eop. Source: the tokenizer and the training script published with ChatGLM2-6B.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from trainspec.errors import DataError
from trainspec.text.fields import BadRecord
from trainspec.text.records import Chat, Encoded, Message, Text

CLASS = "ChatGLMTokenizer"
# Their ids follow the last piece's. None of them is ever made of text.
SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
# What stands before every record, and what a round of a conversation is written as.
FRONT = ("[gMASK]", "sop")
ROUND = "[Round {number}]\n\n问：{question}\n\n答："
BETWEEN = "\n\n"
# A word of ChatGLM3's files, whose conversations have another form.
_OF_CHATGLM3 = "<|user|>"


def is_chatglm(directory: Path) -> bool:
    """Whether a tokenizer's directory is read here: its class is ChatGLM's, and it has no tokenizer.json for transformers."""
    if (directory / "tokenizer.json").is_file():
        return False
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # transformers will say what is wrong with it
    return isinstance(config, dict) and config.get("tokenizer_class") == CLASS


class ChatGLMEncoder:
    """Has the methods of `encode.Encoder` that are used of it. Raises DataError where the tokenizer cannot be read."""

    def __init__(self, directory: Path, chat_template: str | None = None) -> None:
        if chat_template is not None:
            raise DataError("data.chat_template: ChatGLM2 has a prompt of its own; leave it out")
        self._pieces = _load(directory)
        self.bos, self.eos, self.unk = (
            self._pieces.bos_id(),
            self._pieces.eos_id(),
            self._pieces.unk_id(),
        )
        self._special = {name: len(self._pieces) + i for i, name in enumerate(SPECIAL)}
        self._named = {i: name for name, i in self._special.items()}
        self.ends = {self.eos}

    @property
    def special_tokens(self) -> dict[str, tuple[str, int | None]]:
        """Text and id of each of the special tokens; padding is the unknown piece."""
        ids = {"bos": self.bos, "eos": self.eos, "pad": self.unk, "unk": self.unk}
        return {name: (self._pieces.id_to_piece(i), i) for name, i in ids.items()}

    def template(self, tools: object = None) -> str | None:
        """A round of a conversation, in place of a chat template."""
        return ROUND

    def encode(self, record: Chat | Text) -> Encoded:
        """One record. Raises BadRecord for a conversation that its prompt has no place for."""
        if isinstance(record, Chat):
            prompt, answer = _prompt(record.messages, record.tools)
            encoded = self._encoded([(prompt, False), (answer, record.learnt[-1])])
            if any(record.learnt[:-1]):
                encoded.notes.append(
                    "has rounds before the last, which are part of the prompt: no loss is taken on them"
                )
            return encoded
        joined = groupby(record.stretches, key=lambda stretch: stretch[1])
        return self._encoded([("".join(text for text, _ in run), counts) for counts, run in joined])

    def encode_prompt(self, record: Chat | Text) -> tuple[list[int], str]:
        """The ids and the text of everything before a record's last response, which is empty. Raises BadRecord."""
        if isinstance(record, Chat):
            text = _prompt(record.messages, record.tools)[0]
        else:
            text = "".join(text for text, _ in record.stretches)
        return ([*self._front(), *self._pieces.encode(text)] if text else []), text

    @property
    def stops(self) -> list[int]:
        """The ids that end a response."""
        return [self.eos]

    def special_ids(self, texts: Sequence[str]) -> list[int]:
        """The ids of those texts that are special tokens: what `said` leaves out."""
        special = self._special | dict(self.special_tokens.values())
        return [i for i in map(special.get, texts) if i is not None]

    def said(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        return self._pieces.decode([i for i in ids if i < len(self._pieces) and not self._is_mark(i)])

    def encode_plain(self, text: str) -> list[int]:
        """The ids of `text`, after what stands before every record."""
        return [*self._front(), *self._pieces.encode(text)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary piece of each id."""
        return [self._piece(i) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        text = ""
        for is_text, run in groupby(ids, key=lambda i: i < len(self._pieces) and not self._is_mark(i)):
            some = list(run)
            text += self._pieces.decode(some) if is_text else "".join(map(self._piece, some))
        return text

    def _encoded(self, stretches: Sequence[tuple[str, bool]]) -> Encoded:
        """Each stretch encoded by itself, as the published training does with question and answer, and an end token."""
        ids = self._front()
        counts = [False] * len(ids)
        for text, is_learnt in stretches:
            made: list[int] = self._pieces.encode(text)
            ids += made
            # The published training takes no loss on labels that are the padding's id, which is the unknown piece's.
            counts += [is_learnt and i != self.unk for i in made]
        has_answer = bool(stretches) and stretches[-1][1] and bool(stretches[-1][0])
        notes = ["has characters that the tokenizer does not know; no loss is taken on them"]
        return Encoded([*ids, self.eos], [*counts, has_answer], notes=notes if self.unk in ids else [])

    def _front(self) -> list[int]:
        return [self._special[name] for name in FRONT]

    def _is_mark(self, i: int) -> bool:
        return self._pieces.is_control(i) or self._pieces.is_unknown(i)

    def _piece(self, i: int) -> str:
        if i < len(self._pieces):
            return self._pieces.id_to_piece(i)
        return self._named.get(i, f"<{i}>")  # rows that fill the embedding up


def _prompt(messages: Sequence[Message], tools: object) -> tuple[str, str]:
    """Everything before the last answer, and that answer. Raises BadRecord."""
    if tools:
        raise BadRecord("tools have no place in ChatGLM2's prompt; name them in data.ignore")
    for message, role in zip(messages, ("user", "assistant") * len(messages), strict=False):
        if message["role"] == "system":
            raise BadRecord("a system message has no place in ChatGLM2's prompt; put it into the question")
        if message["role"] != role:
            raise BadRecord(
                f"a turn of role {message['role']!r} in place of {role!r}: ChatGLM2's rounds are a question and an answer"
            )
        if more := [name for name in message if name not in ("role", "content")]:
            raise BadRecord(
                f"field {more[0]!r} of a message has no place in ChatGLM2's prompt; name it in data.ignore"
            )
    if len(messages) % 2 or not messages:
        raise BadRecord("the conversation does not end with an answer, on which ChatGLM2 is trained")
    prompt = ""
    for number, (question, answer) in enumerate(zip(messages[::2], messages[1::2], strict=True), 1):
        prompt += ROUND.format(number=number, question=question["content"])
        if 2 * number < len(messages):
            prompt += answer["content"] + BETWEEN
    return prompt, messages[-1]["content"]


def _load(directory: Path) -> Any:
    path, code = directory / "tokenizer.model", directory / "tokenization_chatglm.py"
    if not path.is_file():
        raise DataError(f"{path}: missing; a tokenizer of class {CLASS} is read from it")
    for file in (code, directory / "tokenizer_config.json"):  # read as text
        if file.is_file() and _OF_CHATGLM3 in file.read_text(encoding="utf-8", errors="replace"):
            raise DataError(
                f"{directory}: is ChatGLM3's or a later tokenizer, whose conversations have another form; ChatGLM2's is read, "
                "and any that has a tokenizer.json"
            )
    try:
        pieces = SentencePieceProcessor(model_proto=path.read_bytes())  # pyright: ignore[reportCallIssue]
    except (RuntimeError, ValueError, TypeError) as error:
        raise DataError(f"{path}: no SentencePiece model ({' '.join(str(error).split())})") from None
    if min(pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) < 0:
        raise DataError(f"{path}: has no unknown, begin or end piece; it is not ChatGLM2's")
    return pieces
