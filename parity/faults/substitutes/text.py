"""Conversations encoded in several calls."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Spans = list[tuple[int, int]]


def encoded_apart(encoder: Any, text: str, chosen: Sequence[tuple[int, int]]) -> tuple[list[int], Spans]:
    """Token ids and their offsets; the text is cut where a span of `chosen` begins or ends, and each part encoded alone."""
    ids: list[int] = []
    offsets: Spans = []
    for at, to in pairwise(sorted({0, len(text), *(end for span in chosen for end in span)})):
        cut_ids, spans = encoder._tokens(text[at:to], special=False)
        ids += cut_ids
        offsets += [(at + start, at + end) for start, end in spans]
    return ids, offsets
