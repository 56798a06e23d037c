"""What a run is made of, by content: the same wherever its files lie and whatever they are called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from trainspec.data import Dataset
from trainspec.files.hf import read_model
from trainspec.methods import ADAPTER_FILE, ENCODER_FILE, Method
from trainspec.model import ModelSpec
from trainspec.runs.run import Run
from trainspec.weight import Index, Weight

# In place of a digest: the seed, which the recipe says, decides the weights.
RANDOM = "random"
# Of every row of a tensor that is looked at, so many elements.
SAMPLE = 256


@dataclass(frozen=True)
class Identity:
    """SHA-256 digests of the model's settings and weights, the tokenizer, the tokens of `data.train`, the method's start.

    `weights` is RANDOM where they are drawn, `method` empty where it starts from nothing that is given.
    """

    model: str
    weights: str
    tokenizer: str
    data: str
    method: str


def identity_of(run: Run, dataset: Dataset) -> Identity:
    """What the run trains with."""
    return Identity(
        model=model_digest(run.spec),
        weights=weights_digest(run),
        tokenizer=dataset.tokenizer_digest,
        data=dataset.digest,
        method=start_digest(run.recipe.method),
    )


def model_digest(model: ModelSpec) -> str:
    """SHA-256 of a model's sizes and rules; not of its name, which is that of a directory."""
    given = {
        f.name: getattr(model, f.name)
        for f in fields(model)
        if f.name != "name" and getattr(model, f.name) != f.default
    }
    # What is absent is left out: a rule that a later version knows does not change the digests of models without it.
    return _digest(f"{key}={value!r}".encode() for key, value in given.items() if value not in (None, False))


def weights_digest(run: Run) -> str:
    """SHA-256 of every weight's name, stored type and shape, and of some of its elements; RANDOM where they are drawn.

    Training of any kind moves nearly every element of a tensor, so a few tell other weights of the same shapes without
    reading all of them. Raises WeightsError where the files are not those of the model.
    """
    if run.recipe.model.weights == "random" or run.directory is None:
        return RANDOM
    rows = read_model(run.directory, run.spec, run.model_table, dtype=None)
    return _digest(part for param, weight in rows for part in _sampled(param.name, weight))


def _sampled(name: str, weight: Weight) -> Iterator[bytes]:
    yield f"{name} {weight.dtype.name} {list(weight.shape)}".encode()
    for index in _places(weight.shape):
        yield np.ascontiguousarray(weight[index]).tobytes()


def _places(shape: tuple[int, ...]) -> list[Index]:
    """The start of the first, the middle and the last row."""
    *leading, width = shape
    start = slice(0, min(SAMPLE, width))
    if not leading:
        return [(start,)]
    rows = sorted({0, leading[0] // 2, leading[0] - 1})
    return [(slice(row, row + 1), *(slice(0, 1) for _ in leading[1:]), start) for row in rows]


def start_digest(method: Method) -> str:
    """SHA-256 of what the method starts from: an adapter's tensors or a text; empty where it is drawn."""
    if method.start is not None:
        files = (method.start / name for name in (ADAPTER_FILE, ENCODER_FILE))
        return _digest(_file_digest(path).encode() for path in files if path.is_file())
    if method.start_text is not None:
        return _digest([method.start_text.encode()])
    return ""


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()
