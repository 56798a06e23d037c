"""Hugging Face model directories: read and written tensor by tensor.

Headers are checked against THE TABLE before the first tensor is read: a missing, unexpected or misshapen weight
is one line, not a traceback from deep inside a model.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError, safe_open

from trainspec.errors import ModelError, WeightsError
from trainspec.model import ModelSpec, preset, read_model_spec
from trainspec.params import Param
from trainspec.recipe import ModelSource
from trainspec.tensors import save_tensors
from trainspec.weight import Index, Weight

MODEL_FILE, MODEL_INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json")
FLOATS = ("F64", "F32", "F16", "BF16")
# Beside the weights, a Hugging Face directory is these; they travel with a merged model.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


# What transformers may read of a tokenizer: its fast file, the older ones of every kind, and chat templates.
TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "*.model",
    "*.model.v[0-9]*",
    "*.spm",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "bpe.codes",
    "tokenization_*.py",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
HUB_PATTERNS = ["*.json", "*.safetensors", *TOKENIZER_PATTERNS]


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of the tokenizer in `directory`, sorted, relative to it: what an export copies and a digest is of."""
    found = {path for pattern in TOKENIZER_PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(directory) for path in found)


def resolve_model(source: ModelSource) -> tuple[ModelSpec, Path | None]:
    """The model's spec and its directory: a local one, `hub:ORG/NAME`, or `preset:NAME` (no directory).

    Only `hub:` reaches for the network.
    """
    kind, colon, name = source.from_.partition(":")
    if colon and kind == "preset":
        spec = preset(name)
        if source.weights == "pretrained":
            raise ModelError(f"model.from: {source.from_} has no trained weights; set model.weights=random")
        return spec, None
    directory = _hub_directory(name) if colon and kind == "hub" else Path(source.from_)
    return read_model_spec(directory), directory


@cache
def _hub_directory(name: str) -> Path:
    # Once in a process: it asks the network, and a run resolves its model several times.
    # Imported here so that nothing which talks to a network is loaded unless the person named a hub id.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.from: hub:{name}: {' '.join(str(error).split())}") from None


class TensorFiles:
    """The safetensors files of one directory: every header is read at birth, data one tensor at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    view = file.get_slice(name)
                    if view.get_dtype() not in FLOATS:
                        raise WeightsError(
                            f"{path}: {name} is stored as {view.get_dtype()}; use one of {', '.join(FLOATS)}"
                        )
                    self._file_of[name], self.shapes[name] = path, tuple(view.get_shape())

    def read(self, name: str, index: Index | None = None) -> NDArray[Any]:
        """One tensor, or the part of it at `index`, in its stored type."""
        with _opened(self._file_of[name]) as file:
            return file.get_tensor(name) if index is None else file.get_slice(name)[index]

    def weight(self, name: str, dtype: DTypeLike) -> Weight:
        """One tensor as `dtype`, read as far as it is asked for."""
        return Weight(self.shapes[name], np.dtype(dtype), lambda index: self.read(name, index))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except FileNotFoundError:
        raise WeightsError(f"{path}: missing; the directory is incomplete") from None
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: damaged or cut short ({error}); copy or download it again") from None


def model_files(directory: Path) -> TensorFiles:
    """The weights of a Hugging Face directory: one safetensors file, or shards with an index."""
    index = directory / MODEL_INDEX
    if not index.is_file():
        if not (directory / MODEL_FILE).is_file():
            raise WeightsError(
                f"{directory}: neither {MODEL_FILE} nor {MODEL_INDEX}; weights are read from safetensors only "
                f"(for random ones set model.weights=random)"
            )
        return TensorFiles([directory / MODEL_FILE])
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return TensorFiles([directory / shard for shard in shards])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{index}: not a safetensors index; copy or download it again") from None


def read_rows(
    files: TensorFiles, table: Sequence[Param], *, dtype: DTypeLike, where: Path, ignored: Iterable[str] = ()
) -> Iterator[tuple[Param, Weight]]:
    """Each row's weight as `dtype`, in the table's order, to be read tensor by tensor or part by part.

    Raises WeightsError before the first read where a row is missing or misshapen or a tensor is unexpected;
    names in `ignored` may be there.
    """
    rows = {p.name: p for p in table}
    for name, param in rows.items():
        if name not in files.shapes:
            raise WeightsError(
                f"{where}: {name} is missing; it should be there with shape {list(param.shape)}"
            )
        if files.shapes[name] != param.shape:
            raise WeightsError(
                f"{where}: {name} has shape {list(files.shapes[name])}, the configuration asks for {list(param.shape)}"
            )
    unexpected = sorted(set(files.shapes) - set(rows) - set(ignored))
    if unexpected:
        raise WeightsError(
            f"{where}: {unexpected[0]} is unexpected ({len(unexpected)} in all); it belongs to no weight of this model"
        )
    return ((param, files.weight(param.name, dtype)) for param in table)


def read_model(
    directory: Path, model: ModelSpec, table: Sequence[Param], *, dtype: DTypeLike
) -> Iterator[tuple[Param, Weight]]:
    """The weights of a Hugging Face directory, row by row of `table`, as `dtype`."""
    # Old checkpoints store RoPE's frequencies, and some store the tied head a second time: both are derived.
    ignored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(model.layers)}
    if model.tied_embeddings:
        ignored.add("lm_head.weight")
    return read_rows(model_files(directory), table, dtype=dtype, where=directory, ignored=ignored)


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place once everything in it is written.

    What a person has put there (a model card, say) moves along; weights of an earlier export do not.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if target.exists():
            for file in target.iterdir():
                if not (temporary / file.name).exists() and not file.name.endswith(WEIGHT_ENDINGS):
                    os.rename(file, temporary / file.name)
            retired = temporary.with_name(temporary.name + "-old")
            target.rename(retired)
            temporary.rename(target)
            shutil.rmtree(retired)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model(
    directory: Path,
    weights: Iterable[tuple[str, NDArray[Any]]],
    *,
    companions_from: Path | None,
    config: Mapping[str, Any],
    shard_bytes: int = 4 * 2**30,
) -> None:
    """A Hugging Face directory that `AutoModelForCausalLM` loads: shards of at most `shard_bytes`, with an index.

    One shard is in memory at a time. Tokenizer and generation settings are copied from `companions_from`.
    """
    with replaced_directory(directory) as temporary:
        for name in COMPANIONS:
            if companions_from is not None and (companions_from / name).is_file():
                shutil.copyfile(companions_from / name, temporary / name)
        (temporary / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
        _write_shards(temporary, weights, shard_bytes)


def _write_shards(directory: Path, weights: Iterable[tuple[str, NDArray[Any]]], shard_bytes: int) -> None:
    shards: list[list[str]] = []
    pending: dict[str, NDArray[Any]] = {}
    total = 0

    def flush() -> None:
        refuse_non_finite(pending, directory)
        save_tensors(pending, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, array in weights:
        if pending and sum(a.nbytes for a in pending.values()) + array.nbytes > shard_bytes:
            flush()
        pending[name] = np.ascontiguousarray(array)
        total += array.nbytes
    flush()
    if len(shards) == 1:
        os.rename(directory / "shard-0", directory / MODEL_FILE)
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for i, name in enumerate(names):
        os.rename(directory / f"shard-{i}", directory / name)
    weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def refuse_non_finite(weights: Mapping[str, NDArray[Any]], where: Path) -> None:
    """Raises WeightsError for a tensor that is empty or not finite."""
    for name, array in weights.items():
        if not array.size or not np.isfinite(array.astype(np.float32, copy=False)).all():
            raise WeightsError(
                f"{where}: {name} is {'empty' if not array.size else 'not finite'}; nothing was written"
            )


def check_reads_back(weights: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Raises WeightsError where the file does not hold `weights`, bit for bit."""
    files = TensorFiles([path])
    for name, array in weights.items():
        if files.shapes.get(name) != array.shape or not np.array_equal(files.read(name), array):
            raise WeightsError(
                f"{path}: {name} does not read back as written; the disk may be full or failing"
            )
