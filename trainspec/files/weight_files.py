"""Which files of a Hugging Face directory hold its weights, as transformers chooses them."""

from __future__ import annotations

import json
from pathlib import Path

from trainspec.errors import WeightsError

MODEL_FILE, MODEL_INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(directory: Path) -> list[Path]:
    """The files with the weights: one safetensors file, or else the shards of an index, as in transformers.

    Raises WeightsError where there are none, or shards are missing.
    """
    if (directory / MODEL_FILE).is_file():
        return [directory / MODEL_FILE]
    index = directory / MODEL_INDEX
    if not index.is_file():
        raise WeightsError(_no_weights(directory))
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [directory / shard for shard in shards]
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{index}: not a safetensors index; copy or download it again") from None
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise WeightsError(
            f"{index}: names {len(files)} files, {len(absent)} of them missing, {absent[0]!r} the first; the directory is "
            "incomplete, copy or download it again"
        )
    return files


def convert(directory: Path) -> str:
    """How to get safetensors of the pickled weights in a directory."""
    return f"convert it: torchtrain convert {directory} {directory}-safetensors"


def _no_weights(directory: Path) -> str:
    other = sorted(p.name for p in directory.glob("*") if p.name.endswith((".bin", ".pth", ".pt", ".gguf")))
    weights = next((name for name in other if name.startswith("pytorch_model")), None)
    if weights:
        return f"{directory}: {weights} is not supported, only safetensors are; {convert(directory)}"
    beside = f" (there is {other[0]!r}, another format)" if other else ""
    return (
        f"{directory}: neither {MODEL_FILE} nor {MODEL_INDEX}{beside}; weights are read from safetensors only "
        f"(for random ones set model.weights=random)"
    )
