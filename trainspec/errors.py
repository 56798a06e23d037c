"""What a person can get wrong. Every command turns these into one line on stderr and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the person at the command line: says what, where, and the way out, in one line."""


class RecipeError(UserError):
    """The recipe does not say something that can be run."""


class ModelError(UserError):
    """A model directory or its config.json is missing, malformed or of an unsupported architecture."""


class WeightsError(UserError):
    """A weight is missing, unexpected, of the wrong shape, or its file is damaged."""


class DataError(UserError):
    """A data file is missing or malformed, or holds no usable record."""


class PlanError(UserError):
    """The plan cannot work on this backend; the message names the nearest plan that does."""


class TraceError(UserError):
    """A trace is missing, incomplete or not comparable with the other."""


class NonFiniteLossError(Exception):
    """The loss is NaN or infinite. Raised before the update, so the weights are still good; exit code 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or else the list of what is known."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(options)}"
