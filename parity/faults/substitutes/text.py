"""Conversations that are encoded in several calls."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Spans = list[tuple[int, int]]


def encoded_apart(encoder: Any, text: str, chosen: Sequence[tuple[int, int]]) -> tuple[list[int], Spans]:
    """Ids and where each stands, cut before they are encoded where a span of `chosen` begins or ends."""
    ids: list[int] = []
    offsets: Spans = []
    for at, to in pairwise(sorted({0, len(text), *(end for span in chosen for end in span)})):
        part, places = encoder._tokens(text[at:to], special=False)
        ids += part
        offsets += [(at + start, at + end) for start, end in places]
    return ids, offsets
