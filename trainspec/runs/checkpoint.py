"""The portable checkpoint: trained weights, optimizer moments and the step, in canonical names.

    OUT/checkpoints/step-000050/checkpoint.json         step, recipe, digests of its inputs (`identity`), a SHA-256 per file
    OUT/checkpoints/step-000050/weights.safetensors     <name>: trainable weights only
    OUT/checkpoints/step-000050/moment1.safetensors     <name>; moment2 alike

It depends on neither backend nor plan, so a run can continue elsewhere. It is written under a temporary name, flushed
to disk and then renamed: a kill leaves the whole checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainspec.errors import RecipeError, WeightsError
from trainspec.files.hf import TensorFiles, check_reads_back, read_entries, refuse_non_finite
from trainspec.files.tensors import save_tensors
from trainspec.plans.plan import STORED_DTYPE
from trainspec.recipe import Recipe, recipe_from
from trainspec.runs.identity import Identity
from trainspec.runs.resume import CheckpointOrigin, check_loadable
from trainspec.runs.run import Run
from trainspec.weight import WeightLike

STEP_FOLDER = re.compile(r"step-(\d+)")
ARRAYS = ("weights", "moment1", "moment2")


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` updates: trained weights and moments. A loaded one is read slice by slice, on demand."""

    step: int
    weights: Mapping[str, WeightLike]
    moment1: Mapping[str, WeightLike]
    moment2: Mapping[str, WeightLike]


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:06d}"


def save(out: Path, checkpoint: Checkpoint, *, recipe: Recipe, identity: Identity | None = None) -> Path:
    """Write `checkpoint` under OUT and drop all but the newest `recipe.checkpoint.keep`.

    Without `identity` a run that resumes from it is compared by its recipe only.
    Raises WeightsError, with earlier checkpoints untouched, where a tensor is empty or not finite, a moment does not have
    its weight's shape, or a file does not read back as written.
    """
    folder = out / "checkpoints"
    path = folder / checkpoint_name(checkpoint.step)
    temporary = folder / f".{path.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, checkpoint, recipe, identity)
    except BaseException:  # half a checkpoint would only fill the disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    _flush(folder)
    for old in _all(out)[: -recipe.checkpoint.keep]:
        shutil.rmtree(old)
    return path


def _write(folder: Path, checkpoint: Checkpoint, recipe: Recipe, identity: Identity | None) -> None:
    """Every file of a checkpoint, flushed to the disk."""
    folder.mkdir(parents=True)
    digests = {}
    shapes = {name: weight.shape for name, weight in checkpoint.weights.items()}
    for group in ARRAYS:
        file = folder / f"{group}.safetensors"
        arrays = {name: weight[...] for name, weight in getattr(checkpoint, group).items()}
        mine = {name: array.shape for name, array in arrays.items()}
        odd = next((n for n in (*shapes, *mine) if mine.get(n) != shapes.get(n)), None)
        if odd is not None:
            raise WeightsError(
                f"{file}: {odd} is {mine.get(odd, 'missing')}, the weight {shapes.get(odd, 'missing')}; "
                "no checkpoint was written"
            )
        refuse_non_finite(arrays, file)
        save_tensors(arrays, file)
        check_reads_back(arrays, file)
        digests[file.name] = _sha256(file)
        _flush(file)
    head = {
        "step": checkpoint.step,
        "sha256": digests,
        "identity": asdict(identity) if identity else None,
        "recipe": recipe.model_dump(mode="json", by_alias=True),
    }
    (folder / "checkpoint.json").write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")
    _flush(folder / "checkpoint.json")


def latest(out: Path) -> Path | None:
    """The newest complete checkpoint under OUT, if any."""
    paths = _all(out)
    return paths[-1] if paths else None


def resumable_checkpoint(out: Path, *, resume: bool) -> Path | None:
    """The checkpoint to resume from. Raises RecipeError for one that would be started over, or that is not there."""
    newest = latest(out)
    if newest and not resume:
        raise RecipeError(
            f"{out}: holds {newest.name} of an earlier run; continue with --resume, or give another --out"
        )
    if resume and newest is None:
        raise RecipeError(f"{out}: --resume found no checkpoint there; leave --resume out to start")
    return newest


def read_origin(path: Path) -> CheckpointOrigin:
    """How a checkpoint was made. Raises WeightsError for an incomplete one."""
    head = _read_head(path)
    with _complete(path):
        identity = head.get("identity")  # absent in checkpoints of versions without digests
        return CheckpointOrigin(
            path,
            int(head["step"]),
            _recipe_of(path, head["recipe"]),
            Identity(**identity) if identity else None,
        )


def load(path: Path, run: Run) -> Checkpoint:
    """Verify a checkpoint and open it in the precision of `run`; weights are read slice by slice, on demand.

    Raises WeightsError for a damaged file and RecipeError for another model or method.
    """
    head, made = _read_head(path), read_origin(path)
    with _complete(path):
        for name in (f"{group}.safetensors" for group in ARRAYS):
            if _sha256(path / name) != head["sha256"][name]:
                raise WeightsError(
                    f"{path / name}: damaged (its SHA-256 is not the recorded one); remove {path} to use the one before it"
                )
    check_loadable(made, run)
    dtype = STORED_DTYPE[run.recipe.precision.policy]
    weights, moment1, moment2 = (
        {
            p.name: weight
            for p, weight in read_entries(
                TensorFiles([path / f"{group}.safetensors"]), run.trained, dtype=dtype, where=path
            )
        }
        for group in ARRAYS
    )
    return Checkpoint(made.step, weights, moment1, moment2)


def _read_head(path: Path) -> dict[str, Any]:
    with _complete(path):
        return dict(json.loads((path / "checkpoint.json").read_text(encoding="utf-8")))


@contextmanager
def _complete(path: Path) -> Iterator[None]:
    """Report missing files and keys, and values of another type, as an incomplete checkpoint."""
    try:
        yield
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{path}: incomplete checkpoint ({type(error).__name__}); remove it to use the one before it"
        ) from None


def _recipe_of(path: Path, tree: dict[str, Any]) -> Recipe:
    try:
        return recipe_from(dict(tree))
    except RecipeError as error:
        raise WeightsError(f"{path}: holds a recipe that this version does not know: {error}") from None


def _all(out: Path) -> list[Path]:
    """Complete checkpoints under OUT, oldest first."""
    numbered = [
        (STEP_FOLDER.fullmatch(p.name), p) for p in (out / "checkpoints").glob("step-*") if p.is_dir()
    ]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
