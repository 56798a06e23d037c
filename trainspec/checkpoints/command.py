"""trainspec checkpoint show | verify | consolidate | convert: what a checkpoint holds, and what it becomes for others."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from trainspec.backends import BACKENDS
from trainspec.checkpoints.export import consolidate
from trainspec.checkpoints.folders import checkpoints_of, complete, latest
from trainspec.checkpoints.manifest import FILE, NATIVE, read_manifest
from trainspec.checkpoints.summary import summary_of
from trainspec.checkpoints.verify import damages
from trainspec.errors import EXIT_DONE, EXIT_FAILED, ModelError, Note, ProcessError, RecipeError, UserError
from trainspec.recipe import Recipe, recipe_from
from trainspec.recipe_file import apply_override, check_usable

_NAME = re.compile(r"step-\d+(\..+)?")
_ASIDE = re.compile(r"step-\d+\..+")
_UNFINISHED = re.compile(r"\.step-\d+\.\w+")
# What others' programs leave beside the weights, all of it pickled: Hugging Face's Trainer, DeepSpeed's own and universal.
_TRAINER_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "training_args.bin")
_DEEPSPEED_FILES = ("latest_universal", "zero_to_fp32.py", "zero", "mp_rank_00_model_states.pt")


def run_checkpoint(args: Namespace) -> int:
    """Run one of the commands; returns the exit code."""
    match args.checkpoint_command:
        case "show":
            summary = summary_of(find(args.directory))
            print(summary.as_json() if args.json else "\n".join(summary.lines()))
        case "verify":
            return _verify(args.directory, every=args.all)
        case "consolidate":
            path = find(args.directory)
            print(f"wrote {_consolidate(path, args, args.out, merge=args.merge)}")
        case "convert":
            print(f"wrote {_convert(find(args.directory), args)}")
        case other:
            raise AssertionError(f"the parser let {other!r} through")
    return EXIT_DONE


def find(directory: Path) -> Path:
    """The checkpoint that `directory` is, or the newest complete one of the run whose directory it is.

    Raises UserError where there is none.
    """
    if _is_checkpoint(directory):
        return directory
    out = directory.parent if directory.name == checkpoints_of(Path()).name else directory
    if (newest := latest(out)) is not None:
        return newest
    raise UserError(_no_checkpoint(directory))


def _is_checkpoint(directory: Path) -> bool:
    return directory.is_dir() and bool((directory / FILE).is_file() or _NAME.fullmatch(directory.name))


def _no_checkpoint(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory}: no such directory; give a checkpoint's or a run's"
    found = {path.name for path in directory.iterdir()}
    if found.intersection(_TRAINER_FILES):
        return (
            f"{directory}: Hugging Face's Trainer left this; its optimizer.pt and scheduler.pt are pickles, which are not read here; "
            "its weights are a start: --set method.adapter=DIR for an adapter, --set model.from=DIR for a model"
        )
    if found.intersection(_DEEPSPEED_FILES) or any(name.startswith("global_step") for name in found):
        return (
            f"{directory}: DeepSpeed left this; its files are pickles, which are not read here; save the model there as safetensors "
            "(model.save_pretrained) and start from it: --set model.from=DIR"
        )
    return f"{directory}: no checkpoint there; give a checkpoint's directory, or that of a run which has saved one"


def _verify(directory: Path, *, every: bool) -> int:
    if not every:
        return _told([find(directory)])
    if _is_checkpoint(directory):
        raise UserError(f"--all: {directory} is one checkpoint; give the run's directory, or leave --all out")
    home = directory if directory.name == checkpoints_of(Path()).name else checkpoints_of(directory)
    paths = complete(home.parent)
    if not paths:
        raise UserError(_no_checkpoint(directory))
    code = _told(paths)
    for path in sorted(home.iterdir()):
        if _UNFINISHED.fullmatch(path.name):
            print(f"{path}: unfinished, not used")
        elif _ASIDE.fullmatch(path.name):
            print(f"{path}: set aside, not used")
    return code


def _told(paths: Sequence[Path]) -> int:
    """Print of each checkpoint that it is whole, or what is damaged; returns the exit code."""
    code = EXIT_DONE
    for path in paths:
        lines = damages(path)
        print("\n".join(lines) or f"{path}: whole", flush=True)
        code = EXIT_FAILED if lines else code
    return code


def recipe_of(path: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe that a checkpoint holds, with `--set` on top. Raises RecipeError."""
    manifest = read_manifest(path)
    if not overrides:
        return manifest.origin(path).recipe
    tree = manifest.recipe
    for override in overrides:
        apply_override(tree, override)
    check_usable(tree, path / FILE)
    return recipe_from(tree)


def _consolidate(path: Path, args: Namespace, out: Path, *, merge: bool) -> Path:
    """Write one checkpoint as a Hugging Face model or a PEFT adapter into `out`, and return it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; give another directory, or remove it")
    try:
        consolidate(path, recipe_of(path, args.overrides), out, merge=merge, dtype=args.dtype)
    except ModelError as error:
        if not any(override.startswith("model.from=") for override in args.overrides):
            error.add_note(Note("if the model has moved, name it with --set model.from=DIR"))
        raise
    return out


def _convert(path: Path, args: Namespace) -> Path:
    """Write one checkpoint in another format into OUT, and return it."""
    out, target = args.out, args.to
    match target:
        case "hf" | "peft":
            method = recipe_of(path, args.overrides).method
            if target == "peft" and method.trains_model:
                raise RecipeError(
                    f"--to peft: method.kind={method.kind} trains the model itself and has no adapter; give --to hf"
                )
            if target == "hf" and not method.trains_model and method.not_merged is not None:
                raise RecipeError(f"--to hf: method.kind={method.kind} {method.not_merged}; give --to peft")
            return _consolidate(path, args, out, merge=target == "hf" and not method.trains_model)
        case "universal":
            raise UserError(
                "--to universal: DeepSpeed's universal layout keeps every tensor pickled (zero/NAME/fp32.pt), and nothing here writes "
                "such files; torchtrain resumes from this checkpoint itself, whatever the plan, and for another program "
                "`trainspec checkpoint consolidate` writes the weights without the moments"
            )
        case "trainer":
            raise UserError(
                "--to trainer: the Trainer keeps its optimizer pickled (optimizer.pt), and nothing here writes such files; "
                "`trainspec checkpoint consolidate` writes the model or the adapter, which Trainer starts from with new moments"
            )
        case "portable" | "native":
            for option, given in {"--dtype": args.dtype, "--set": args.overrides}.items():
                if given:
                    raise UserError(
                        f"{option}: --to {target} writes the same arrays and the same recipe in other files; leave it out"
                    )
            return _between_formats(path, out, target)
        case other:
            raise AssertionError(f"the parser let {other!r} through")


def _between_formats(path: Path, out: Path, target: str) -> Path:
    """Have the backend whose native format it is write a checkpoint in the other format, in a process with its framework."""
    manifest = read_manifest(path)
    if manifest.format == target:
        raise UserError(f"--to {target}: {path} is in that format already; copy its directory")
    makers = (each for each in BACKENDS.values() if each.no_native_format is None)
    backend = next((each for each in makers if target == NATIVE or each.name == manifest.backend), None)
    if backend is None:
        whose = manifest.backend or "an unnamed backend"
        raise UserError(f"{path}: is in the native format of {whose}, which no backend here reads")
    command = [sys.executable, "-m", f"{backend.program}.native", str(path), str(out)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        line = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it ended without a word"
        if line.startswith("ModuleNotFoundError"):
            raise UserError(
                f"--to {target}: is made by {backend.program}, whose packages are not installed ({line})"
            )
        raise ProcessError(line.removeprefix(f"{backend.program}.native: "), done.returncode)
    return out
