"""Digests of a run's inputs by content: independent of where the files are and what they are called."""

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

# Instead of a digest: the weights follow from the seed in the recipe.
RANDOM = "random"
# Elements per sampled row of a tensor.
SAMPLE = 256


@dataclass(frozen=True)
class Identity:
    """SHA-256 digests of the model's settings and weights, the tokenizer, the tokens of `data.train`, the method's start.

    `weights` is RANDOM for random weights; `method` is empty unless it starts from an adapter or a text.
    """

    model: str
    weights: str
    tokenizer: str
    data: str
    method: str


def identity_of(run: Run, dataset: Dataset) -> Identity:
    """The identity of a run that trains on `dataset`."""
    return Identity(
        model=model_digest(run.spec),
        weights=weights_digest(run),
        tokenizer=dataset.tokenizer_digest,
        data=dataset.digest,
        method=start_digest(run.recipe.method),
    )


def model_digest(model: ModelSpec) -> str:
    """SHA-256 of a model's sizes and rules, without its name, which is a directory's."""
    given = {
        f.name: getattr(model, f.name)
        for f in fields(model)
        if f.name != "name" and getattr(model, f.name) != f.default
    }
    # Absent values are left out, so that a rule of a later version does not change the digests of models without it.
    return _digest(f"{key}={value!r}".encode() for key, value in given.items() if value not in (None, False))


def weights_digest(run: Run) -> str:
    """SHA-256 of every weight's name, stored type, shape and a sample of its elements; RANDOM for random weights.

    Any training moves nearly every element of a tensor, so that a sample is enough to tell weights of equal shapes apart.
    Raises WeightsError where the files do not fit the model.
    """
    if run.recipe.model.weights == "random" or run.directory is None:
        return RANDOM
    entries = read_model(run.directory, run.spec, run.model_table, dtype=None)
    return _digest(chunk for param, weight in entries for chunk in _sampled(param.name, weight))


def _sampled(name: str, weight: Weight) -> Iterator[bytes]:
    yield f"{name} {weight.dtype.name} {list(weight.shape)}".encode()
    for index in _sample_slices(weight.shape):
        yield np.ascontiguousarray(weight[index]).tobytes()


def _sample_slices(shape: tuple[int, ...]) -> list[Index]:
    """The beginnings of the first, the middle and the last row."""
    *leading, width = shape
    start = slice(0, min(SAMPLE, width))
    if not leading:
        return [(start,)]
    rows = sorted({0, leading[0] // 2, leading[0] - 1})
    return [(slice(row, row + 1), *(slice(0, 1) for _ in leading[1:]), start) for row in rows]


def start_digest(method: Method) -> str:
    """SHA-256 of the adapter's tensors or the text that the method starts from; empty for random weights."""
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
