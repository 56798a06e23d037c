"""A prompt, and what was generated after it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trainspec.generation.choice import TokenScore

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """A prompt's text and ids, and the response that its record has, if any."""

    prompt: str
    ids: tuple[int, ...]
    reference: str | None = None


@dataclass(frozen=True)
class Generation:
    """What was generated after a prompt: `ids` with the token that ends it, `text` without.

    `finish` is `stop` where an end token or a stop text came, `length` where the limit was reached. `scores` has what the logits
    said of each of `ids`, where that was asked for.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish: Finish
    reference: str | None = None
    scores: tuple[TokenScore, ...] | None = None

    def line(self) -> str:
        """A line of generations.jsonl."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(fields, ensure_ascii=False)


def read_generations(path: Path) -> list[Generation]:
    """The generations in a generations.jsonl."""
    # A text may hold characters that `splitlines` takes for the end of a line.
    return [_generation(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _generation(line: str) -> Generation:
    said = json.loads(line)
    return Generation(
        said["prompt"],
        tuple(said["prompt_ids"]),
        tuple(said["ids"]),
        said["text"],
        said["finish"],
        said.get("reference"),
        tuple(TokenScore(**each) for each in said["scores"]) if "scores" in said else None,
    )
