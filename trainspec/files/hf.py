"""Hugging Face model directories, read and written tensor by tensor.

Headers are checked against THE TABLE before the first tensor is read, so that a missing, unexpected or misshapen weight
is reported in one line.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trainspec.errors import ModelError, WeightsError
from trainspec.families import family_of, family_of_config, preset
from trainspec.families.family import Family
from trainspec.files.digests import digest_of
from trainspec.files.model_config import config_notes, read_config, read_model_spec
from trainspec.files.tensors import FLOATS, TensorFile, write_tensors
from trainspec.files.weight_files import MODEL_FILE, MODEL_INDEX, weight_files
from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.recipe import ModelSource
from trainspec.weight import Index, Weight, WeightLike, blocks, computed, stacked

WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json")
COMPARED_BYTES = 2**26
GENERATION_CONFIG, CHAT_TEMPLATE = "generation_config.json", "chat_template.jinja"
# The tokenizer files that transformers may read: the fast tokenizer's, those of older kinds, and chat templates.
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
    CHAT_TEMPLATE,
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
CONFIG_PATTERNS = ["*.json", *TOKENIZER_PATTERNS]
HUB_PATTERNS = [*CONFIG_PATTERNS, "*.safetensors"]


def end_tokens(directory: Path | None) -> frozenset[int]:
    """The ids at which a model's own files say that generation ends: of generation_config.json, or else config.json."""
    for name in (GENERATION_CONFIG, "config.json"):
        try:
            found = json.loads(((directory or Path()) / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        ids = found if isinstance(found, list) else [found]
        if directory is not None and (known := [i for i in ids if isinstance(i, int)]):
            return frozenset(known)
    return frozenset()


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of the tokenizer in `directory`, relative to it and sorted: what is exported and hashed."""
    paths = {path for pattern in TOKENIZER_PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(directory) for path in paths)


def resolve_model(source: ModelSource) -> tuple[ModelSpec, Path | None]:
    """The model's spec and its directory: a local one, `hub:ORG/NAME`, or `preset:NAME` (no directory).

    Only `hub:` uses the network. A head that is stored separately is one whatever the config says of ties, as in
    transformers. Raises ModelError.
    """
    spec, directory = resolve_config(source, fetch_weights=True)
    if source.weights == "pretrained":
        if directory is None:
            raise ModelError(f"model.from: {source.from_} has no trained weights; set model.weights=random")
        if (directory / "adapter_config.json").is_file():
            raise ModelError(
                f"model.from: {directory} holds an adapter as well as the model (adapter_config.json), and transformers would "
                "apply it; move it to a directory of its own and name that with method.adapter, or remove it"
            )
        if spec.tied_embeddings and _has_own_head(directory, spec):
            spec = replace(spec, tied_embeddings=False)
    return spec, directory


def resolve_config(source: ModelSource, *, fetch_weights: bool = False) -> tuple[ModelSpec, Path | None]:
    """`resolve_model` without looking at weights: what `config.json` says, or the preset. Of `hub:` it fetches none by default."""
    kind, colon, name = source.from_.partition(":")
    if colon and kind == "preset":
        return preset(name), None
    directory = _hub_directory(name, weights=fetch_weights) if colon and kind == "hub" else Path(source.from_)
    return read_model_spec(directory), directory


def model_notes(source: ModelSource, spec: ModelSpec, directory: Path | None) -> list[str]:
    """A line for every contradiction between the model's files, saying which of the two is trained."""
    if directory is None:
        return []
    config = read_config(directory)
    notes = config_notes(config, where=str(directory / "config.json"))
    if source.weights == "random":
        return notes
    if (directory / MODEL_FILE).is_file() and (directory / MODEL_INDEX).is_file():
        notes.append(
            f"{directory}: there are two sets of weights; as in transformers, {MODEL_FILE} is read and {MODEL_INDEX} is not"
        )
    if config.get("tie_word_embeddings") and not spec.tied_embeddings:
        family = family_of(spec)
        notes.append(
            f"{directory}: tie_word_embeddings is true, but {family.head} and {family.embedding} are two different weights; as in "
            "transformers both are kept, and an export says false"
        )
    return notes


def _has_own_head(directory: Path, spec: ModelSpec) -> bool:
    try:
        files = weight_files(directory)
    except WeightsError:
        return False  # reading the weights reports the error
    stats = [(path, path.stat()) for path in files]
    ends = family_of(spec).embedding, family_of(spec).head
    return _heads_differ(tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats), ends)


@cache
def _heads_differ(stamped: tuple[tuple[Path, int, int], ...], ends: tuple[str, str]) -> bool:
    """Whether the `ends`, embedding and head, are both stored and differ. Cached, as both may be large."""
    files = TensorFiles([path for path, *_ in stamped])
    if not set(ends) <= files.shapes.keys():
        return False
    first, second = (files.weight(name, np.float64) for name in ends)
    if first.shape != second.shape or len(first.shape) != 2:
        return first.shape != second.shape
    rows, width = first.shape
    step = max(1, COMPARED_BYTES // (8 * max(1, width)))
    blocks = ((slice(at, min(at + step, rows)), slice(None)) for at in range(0, rows, step))
    return not all(np.array_equal(first[block], second[block]) for block in blocks)


@cache
def _hub_directory(name: str, *, weights: bool) -> Path:
    # Cached, as it uses the network and a run resolves its model several times. Imported here, so that nothing that uses
    # the network is loaded unless the user named a hub id.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS if weights else CONFIG_PATTERNS))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.from: hub:{name}: {' '.join(str(error).split())}") from None


class Tensors(Protocol):
    """Tensors by name, in whatever files: their shapes are known, their data is read on demand."""

    shapes: dict[str, tuple[int, ...]]

    def weight(self, name: str, dtype: DTypeLike | None) -> Weight:
        """One tensor as `dtype` (None: as stored)."""
        ...


class TensorFiles:
    """The safetensors files of one directory: headers are read at once, data one tensor at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._location: dict[str, tuple[TensorFile, str]] = {}
        self._first_row: dict[str, int] = {}  # of what is a part of a stored tensor
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        for path in files:
            file = TensorFile(path)
            for name, entry in file.entries.items():
                if entry.dtype not in FLOATS:
                    raise WeightsError(
                        f"{path}: {name} is stored as {entry.dtype}; use one of {', '.join(FLOATS)}"
                    )
                self._location[name], self.shapes[name] = (file, name), entry.shape
                self.dtypes[name] = FLOATS[entry.dtype]

    def alias(self, name: str, stored: str) -> None:
        """Make the tensor `stored` available as `name`, too."""
        for column in (self._location, self.shapes, self.dtypes):
            column[name] = column[stored]  # type: ignore[assignment]

    def split(self, stored: str, parts: Mapping[str, tuple[int, ...]]) -> None:
        """Replace the tensor `stored` by `parts`, names and shapes, which stand in it one below the other."""
        first = 0
        for name, shape in parts.items():
            self.alias(name, stored)
            self.shapes[name], self._first_row[name] = shape, first
            first += shape[0]
        for column in (self._location, self.shapes, self.dtypes):
            if stored not in parts:
                del column[stored]

    def read(self, name: str, index: Index | None = None) -> NDArray[Any]:
        """One tensor, or its slice at `index`, in its stored type."""
        file, stored = self._location[name]
        if name in self._first_row:
            rows, *columns = index or (slice(None),) * len(self.shapes[name])
            first, end, step = rows.indices(self.shapes[name][0])
            moved = self._first_row[name]
            index = (slice(first + moved, end + moved, step), *columns)
        return file.read(stored, index)

    def weight(self, name: str, dtype: DTypeLike | None) -> Weight:
        """One tensor as `dtype` (None: as stored), read on demand."""
        wanted = self.dtypes[name] if dtype is None else np.dtype(dtype)
        return Weight(self.shapes[name], wanted, lambda index: self.read(name, index))


def model_files(directory: Path) -> TensorFiles:
    """The weight files of a Hugging Face directory."""
    return TensorFiles(weight_files(directory))


def read_entries(
    files: Tensors,
    table: Sequence[Param],
    *,
    dtype: DTypeLike | None,
    where: Path,
    ignored: Iterable[str] = (),
) -> Iterator[tuple[Param, Weight]]:
    """The weight of each entry of `table` as `dtype` (None: as stored), read slice by slice, on demand.

    Raises WeightsError before the first read where a weight is missing or misshapen or a tensor is unexpected;
    names in `ignored` may be there.
    """
    entries = {p.name: p for p in table}
    for name, param in entries.items():
        if name not in files.shapes:
            raise WeightsError(f"{where}: {name} is missing; it should have shape {list(param.shape)}")
        if files.shapes[name] != param.shape:
            raise WeightsError(
                f"{where}: {name} has shape {list(files.shapes[name])}, the configuration requires {list(param.shape)}"
            )
    unexpected = sorted(set(files.shapes) - set(entries) - set(ignored))
    if unexpected:
        raise WeightsError(
            f"{where}: {unexpected[0]} is unexpected ({len(unexpected)} in all); it belongs to no weight of this model"
        )
    return ((param, files.weight(param.name, dtype)) for param in table)


def read_model(
    directory: Path, model: ModelSpec, table: Sequence[Param], *, dtype: DTypeLike | None
) -> Iterator[tuple[Param, Weight]]:
    """The weights of a Hugging Face directory, by the entries of `table`, as `dtype` (None: as stored).

    Of tied weights one or both may be stored. Raises WeightsError before the first read.
    """
    files, family = model_files(directory), family_of(model)
    _find_weights(files, family, table, where=directory)
    # Old checkpoints store RoPE's frequencies, which are derived.
    ignored = {name for name in files.shapes if name.endswith("rotary_emb.inv_freq")} | {*family.derived}
    if model.tied_embeddings:
        ignored.add(family.head)
        if family.embedding not in files.shapes and family.head in files.shapes:
            files.alias(family.embedding, family.head)
    return read_entries(files, table, dtype=dtype, where=directory, ignored=ignored)


def _find_weights(files: TensorFiles, family: Family, table: Sequence[Param], *, where: Path) -> None:
    """Let `files` have the weights of `table` by their names there. Raises WeightsError where a family's own tensor does not fit."""
    tensors: dict[str, dict[str, tuple[int, ...]]] = {}
    for param in table:
        tensors.setdefault(family.stored(param.name).name, {})[param.name] = param.shape
    for stored, parts in tensors.items():
        if list(parts) == [stored]:
            continue
        (_, *rest), rows = next(iter(parts.values())), sum(shape[0] for shape in parts.values())
        if files.shapes.get(stored) != (rows, *rest):
            found = f"has shape {list(files.shapes[stored])}" if stored in files.shapes else "is missing"
            raise WeightsError(f"{where}: {stored} {found}; the configuration requires {[rows, *rest]}")
        files.split(stored, parts)


def _as_stored(weights: Iterable[tuple[str, WeightLike]], family: Family) -> Iterator[tuple[str, WeightLike]]:
    """The tensors of a family's files, each as soon as all its parts were there."""
    waiting: dict[str, dict[int, WeightLike]] = {}
    for name, weight in weights:
        stored = family.stored(name)
        parts = waiting.setdefault(stored.name, {})
        parts[stored.part] = weight
        if len(parts) == stored.parts:
            yield (
                stored.name,
                weight if stored.parts == 1 else stacked([parts[i] for i in range(stored.parts)]),
            )
            del waiting[stored.name]
    assert not waiting, f"only parts of {sorted(waiting)}"


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that replaces `target` when the context ends without an error.

    A user's own files there (a model card, say) are kept; weights and tokenizer of an earlier export are not.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if target.exists():
            exported = {path.parts[0] for path in tokenizer_files(target)}
            for file in target.iterdir():
                if file.name in exported or file.name.endswith(WEIGHT_ENDINGS):
                    continue
                if not (temporary / file.name).exists():
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
    weights: Iterable[tuple[str, WeightLike]],
    *,
    companions_from: Path | None,
    config: Mapping[str, Any],
    tokenizer_from: Path | None = None,
    chat_template: str | None = None,
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a Hugging Face directory: shards of at most `shard_bytes`, with an index, with the names of the config's family.

    Of weights that are read on demand one block is in memory at a time. Generation settings are copied from `companions_from`, the
    tokenizer from `tokenizer_from` or else from there; `chat_template` replaces the tokenizer's. Raises WeightsError, with an
    earlier directory untouched, for a weight that is not finite, or a file that does not read back as written.
    """
    with replaced_directory(directory) as temporary:
        if companions_from is not None and (companions_from / GENERATION_CONFIG).is_file():
            shutil.copyfile(companions_from / GENERATION_CONFIG, temporary / GENERATION_CONFIG)
        copy_tokenizer(tokenizer_from or companions_from, temporary, chat_template=chat_template)
        text = json.dumps(dict(config), indent=2) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        family = family_of_config(dict(config), where=str(directory))
        _write_shards(temporary, _as_stored(weights, family), shard_bytes, where=directory)


def copy_tokenizer(source: Path | None, target: Path, *, chat_template: str | None) -> None:
    """Copy the tokenizer files of `source`; `chat_template`, the text of one, replaces all templates there."""
    if source is not None:
        for path in tokenizer_files(source):
            is_template = path.suffix == ".jinja" or path.name == "chat_template.json"
            if chat_template is None or not is_template:
                (target / path).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / path, target / path)
    if chat_template is not None:
        (target / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")


def _write_shards(
    directory: Path, weights: Iterable[tuple[str, WeightLike]], shard_bytes: int, *, where: Path
) -> None:
    shards: list[dict[str, WeightLike]] = [{}]
    room = shard_bytes
    for name, weight in weights:
        if shards[-1] and _bytes_of(weight) > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = weight
        room -= _bytes_of(weight)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [MODEL_FILE]
    for name, tensors in zip(names, shards, strict=True):
        write_finite(tensors, directory / name, where=where)
    if len(shards) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        total = sum(_bytes_of(weight) for tensors in shards for weight in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes_of(weight: WeightLike) -> int:
    return math.prod(weight.shape) * weight.dtype.itemsize


def write_finite(weights: Mapping[str, WeightLike], path: Path, *, where: Path) -> None:
    """Write a safetensors file, one block of a weight in memory at a time, and read it back.

    Raises WeightsError, which names `where`, for a weight that is empty or not finite, or a file that is not as written.
    """
    checked = {name: _finite(name, weight, where) for name, weight in weights.items()}
    digest = write_tensors(checked, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        if digest_of(file) != digest:
            raise WeightsError(f"{path}: does not read back as written; the disk may be full or failing")


def _finite(name: str, weight: WeightLike, where: Path) -> Weight:
    """The weight, whose reading raises WeightsError where it is not finite."""

    def read(index: Index) -> NDArray[Any]:
        block = weight[index]
        if not np.isfinite(block.astype(np.float32, copy=False)).all():
            raise WeightsError(f"{where}: {name} is not finite; nothing was written")
        return block

    if not math.prod(weight.shape):
        raise WeightsError(f"{where}: {name} is empty; nothing was written")
    return computed(weight.shape, weight.dtype, read)


def refuse_non_finite(weights: Mapping[str, WeightLike], where: Path) -> None:
    """Raises WeightsError for a tensor that is empty or not finite."""
    for name, weight in weights.items():
        checked = _finite(name, weight, where)
        for block in blocks(checked.shape):
            checked[block]


def check_reads_back(weights: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Raises WeightsError where the file does not hold `weights`, bit for bit."""
    files = TensorFiles([path])
    for name, array in weights.items():
        if files.shapes.get(name) != array.shape or not np.array_equal(files.read(name), array):
            raise WeightsError(
                f"{path}: {name} does not read back as written; the disk may be full or failing"
            )
