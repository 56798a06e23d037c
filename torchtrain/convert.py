"""torchtrain convert DIR OUT: pickled weights (`.bin`) as safetensors, bit for bit.

The only place that reads such files, with torch's `weights_only` loader: it makes tensors and runs no code of the file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from torchtrain.precision import to_numpy
from trainspec.errors import UserError, WeightsError
from trainspec.files.hf import (
    CONFIG_PATTERNS,
    FLOATS,
    WEIGHT_ENDINGS,
    check_reads_back,
    refuse_non_finite,
    replaced_directory,
    tokenizer_files,
)
from trainspec.files.tensors import save_tensors

MODEL, INDEX, ADAPTER = "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"
_SHARD = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")


def convert(directory: Path, out: Path) -> Path:
    """Write the weights of `directory` into `out` as safetensors, with its settings and its tokenizer; returns `out`.

    Raises WeightsError, with an earlier `out` untouched, where they cannot be read or hold anything but named tensors.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give one with pickled weights ({MODEL})")
    if out.exists() and (not out.is_dir() or out.resolve() == directory.resolve()):
        raise UserError(f"{out}: give another directory to write to")
    files = _pickled(directory)
    with replaced_directory(out) as temporary:
        where: dict[str, str] = {}
        total = 0
        for path in files:
            name = _converted(path.name)
            tensors = dict(_tensors(path))
            refuse_non_finite(tensors, path)
            for tensor in tensors.keys() & where.keys():
                raise WeightsError(f"{path}: {tensor} is in {where[tensor]} as well")
            save_tensors(tensors, temporary / name, metadata={"format": "pt"})
            check_reads_back(tensors, temporary / name)
            where |= dict.fromkeys(tensors, name)
            total += sum(array.nbytes for array in tensors.values())
        if (directory / INDEX).is_file():
            index = {"metadata": {"total_size": total}, "weight_map": where}
            text = json.dumps(index, indent=2) + "\n"
            (temporary / _converted(INDEX)).write_text(text, encoding="utf-8")
        for companion in _companions(directory):
            (temporary / companion).parent.mkdir(exist_ok=True)
            shutil.copyfile(directory / companion, temporary / companion)
    return out


def _pickled(directory: Path) -> list[Path]:
    """The files with pickled weights: those of an index, or the only one."""
    if (directory / INDEX).is_file():
        try:
            index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
            raise WeightsError(
                f"{directory / INDEX}: not an index of weights; copy or download it again"
            ) from None
        for name in names:
            # Also keeps names from leading out of the directory.
            if not isinstance(name, str) or not _SHARD.fullmatch(name) or not (directory / name).is_file():
                raise WeightsError(f"{directory / INDEX}: names {name!r}, which is not there")
        return [directory / name for name in names]
    for name in (MODEL, ADAPTER):
        if (directory / name).is_file():
            return [directory / name]
    raise WeightsError(f"{directory}: no pickled weights; known here: {MODEL}, {INDEX}, {ADAPTER}")


def _tensors(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors of a pickled file by name. Raises WeightsError for any other content."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's reader raises errors of every kind
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(
            f"{path}: damaged, or more than tensors, which are all that is read ({why})"
        ) from None
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{path}: not a dictionary of tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise WeightsError(
                f"{path}: {name!r:.80} is no tensor; weights are a dictionary of tensors by name"
            )
        stored = str(tensor.dtype).removeprefix("torch.")
        if stored not in {str(dtype) for dtype in FLOATS.values()} or tensor.layout != torch.strided:
            raise WeightsError(
                f"{path}: {name} is stored as {stored}; rounded or sparse weights are not read"
            )
        yield name, to_numpy(tensor.contiguous())


def _companions(directory: Path) -> list[Path]:
    """Settings and tokenizer, relative to the directory: no weights, no code that would be run."""
    settings = {
        path.relative_to(directory) for pattern in CONFIG_PATTERNS for path in directory.glob(pattern)
    }
    chosen = {*settings, *tokenizer_files(directory)} - {Path(INDEX)}
    return sorted(
        path for path in chosen if (directory / path).is_file() and not path.name.endswith(WEIGHT_ENDINGS)
    )


def _converted(name: str) -> str:
    """The name of a file after the conversion, as transformers and PEFT have it."""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
