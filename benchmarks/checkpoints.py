"""How fast a checkpoint is saved and loaded, beside cp, safetensors' own writer, orbax and torch's DCP; and in how much memory.

    python benchmarks/checkpoints.py [--gigabytes 1] [--tensors 300] [--rounds 5] [--json FILE]

Weights and both moments in float32, random numbers. Each program is a process of its own, and they take turns. `write` is
without the flush to the disk, which cp and safetensors do not do either; `save` with it: for these two an fsync comes after,
for the others it is what each calls its save. `load` has the files in the system's cache and ends with all arrays in memory, ours after their digests were compared.
`blocking` is the part of an asynchronous save that a run waits for; ours of a run's later saves (`again`), which copy into the memory of
the first, and of the first beside it, whose memory is made before, as during a run's first updates. Its core seconds are beside it: other work on the machine
lengthens what two threads do at once more than the rest. Memory is the growth of the process, in states.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
from turns import Launch, Program, TurnError, command_line, machine

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "build/benchmark-checkpoints"
KINDS = ("weights", "moment1", "moment2")
PROGRAMS = ("cp", "safetensors", "twintrain", "orbax", "dcp")
Arrays = dict[str, np.ndarray]


def main() -> None:
    """Let the programs take turns and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--tensors", type=int, default=300, help="of each of the three kinds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--json", type=Path, help="write every round's figures there")
    parser.add_argument("--worker", choices=PROGRAMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.gigabytes, arguments.tensors)
        return
    print(f"`{command_line()}`\n\n{machine()}\n", flush=True)
    rounds = measured(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rounds, indent=2) + "\n", encoding="utf-8")
    print(table(rounds))


def measured(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Each program's figures of every round. What cannot run has none, and says why."""
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    sizes = ["--gigabytes", str(arguments.gigabytes), "--tensors", str(arguments.tensors)]
    programs: dict[str, Program] = {}
    rounds: dict[str, list[dict[str, float]]] = {}
    try:
        for name in arguments.programs:
            command = [sys.executable, __file__, "--worker", name, *sizes]
            environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
            try:
                programs[name] = Program(Launch(name, command, environment), log=HOME / f"{name}.log")
                programs[name].turn(1)  # files are new, and libraries are loaded
                rounds[name] = []
            except TurnError as error:
                print(error, file=sys.stderr)
        for number in range(arguments.rounds):
            for name in list(rounds) if number % 2 == 0 else list(rounds)[::-1]:
                rounds[name].append(programs[name].turn(1))
    finally:
        for program in programs.values():
            program.kill()
        shutil.rmtree(HOME, ignore_errors=True)
    return rounds


def table(rounds: dict[str, list[dict[str, float]]]) -> str:
    """Medians, and the ratios of the rounds to cp's and safetensors'."""
    columns = ("write", "save", "load", "read")
    lines = [
        "| | write, GB/s | save, GB/s | load, GB/s | read, GB/s | core s of a save | blocking ÷ save | memory of save | memory of load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, each in rounds.items():
        cells = [_middle(each, column, "{:.2f}") for column in columns]
        cells += [
            _middle(each, column, "{:.2f}")
            for column in ("core_seconds", "blocking", "save_memory", "load_memory")
        ]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    ours = rounds.get("twintrain", [])
    for column, what in (
        ("first_blocking", "blocking ÷ save of a run's first save"),
        ("first_blocking_cores", "the same in core seconds"),
        ("blocking_cores", "blocking ÷ save of a later save in core seconds"),
        ("room_core_seconds", "core seconds for its memory before the first save"),
        ("again", "GB/s of a later save"),
        ("again_core_seconds", "core seconds of a later save"),
    ):
        if ours:
            lines.append(f"\ntwintrain: {_middle(ours, column, '{:.2f}')} {what}")
    for other, column in (("cp", "write"), ("cp", "save"), ("safetensors", "write"), ("safetensors", "save"), ("safetensors", "load"), ("safetensors", "read"), ("orbax", "save"), ("orbax", "load"), ("dcp", "save"), ("dcp", "load")):  # fmt: skip
        pairs = [
            (mine[column], theirs.get(column, theirs.get("load" if column == "read" else column)))
            for mine, theirs in zip(ours, rounds.get(other, []), strict=False)
        ]
        ratios = [mine / theirs for mine, theirs in pairs if theirs]
        if ratios:
            lines.append(
                f"\n{column} beside {other}: {median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
            )
    return "\n".join(lines)


def _middle(rounds: list[dict[str, float]], column: str, form: str) -> str:
    found = [each[column] for each in rounds if column in each]
    return form.format(median(found)) if found else ""


def state_of(gigabytes: float, tensors: int, seed: int) -> dict[str, Arrays]:
    """Random arrays of the three kinds; matrices of equal size."""
    rng = np.random.default_rng(seed)
    elements = int(gigabytes * 1e9) // (4 * len(KINDS) * tensors)
    width = max(1, min(1024, elements))
    shape = (max(1, elements // width), width)
    return {
        kind: {f"layers.{i}.weight": rng.random(shape, np.float32) for i in range(tensors)} for kind in KINDS
    }


@dataclass
class Taken:
    """What a part of a turn took."""

    seconds: float
    core_seconds: float
    growth_bytes: int


def taken(action: Callable[[], Any]) -> Taken:
    """Do it; what it returns is in memory at the end."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not taken for room that was there
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is in memory
    before, used, began = _memory("VmRSS"), _cores(), time.perf_counter()
    result = action()
    seconds, core = time.perf_counter() - began, _cores() - used
    growth = _memory("VmHWM") - before
    del result
    return Taken(seconds, core, growth)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _cores() -> float:
    """Core seconds of this process and of those that it has started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def work(name: str, gigabytes: float, tensors: int) -> None:
    """Be one of the programs: a turn for every line that is read."""
    turn = globals()[f"turn_of_{name}"]
    print(json.dumps({"ready": True}), flush=True)
    for number, line in enumerate(sys.stdin):
        if line.strip() == "end":
            return
        folder = HOME / f"{name}-{number}"
        folder.mkdir(parents=True)
        arrays = state_of(gigabytes, tensors, number)
        size = sum(array.nbytes for kind in arrays.values() for array in kind.values())
        figures = turn(folder, arrays, size)
        shutil.rmtree(folder)
        print(json.dumps(figures), flush=True)


def _figures(size: int, **parts: Taken) -> dict[str, float]:
    figures = {name: size / 1e9 / part.seconds for name, part in parts.items()}
    first = parts.get("save") or parts["write"]
    figures["core_seconds"] = first.core_seconds
    figures["save_memory"] = first.growth_bytes / size
    if "load" in parts:
        figures["load_memory"] = parts["load"].growth_bytes / size
    return figures


def turn_of_cp(folder: Path, arrays: dict[str, Arrays], size: int) -> dict[str, float]:
    """The same bytes as a file, copied, and read into memory."""
    source, target = folder / "source", folder / "target"
    with source.open("wb") as file:
        for kind in arrays.values():
            for array in kind.values():
                file.write(array.data)
    arrays.clear()
    flushed(source)

    def save() -> None:
        subprocess.run(["cp", source, target], check=True)
        flushed(target)

    saved = taken(save)
    target.unlink()
    write = taken(lambda: subprocess.run(["cp", source, target], check=True))
    return _figures(size, write=write, save=saved, load=taken(lambda: np.fromfile(target, np.uint8)))


def flushed(*files: Path) -> None:
    """Have these files on the disk."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def turn_of_safetensors(folder: Path, arrays: dict[str, Arrays], size: int) -> dict[str, float]:
    """safetensors' own functions for numpy: a file for each kind."""
    from safetensors.numpy import load_file, save_file

    def write() -> None:
        for name, kind in arrays.items():
            save_file(kind, folder / name)

    def save() -> None:
        write()
        flushed(*(folder / name for name in KINDS))

    saved = taken(save)
    for name in KINDS:
        (folder / name).unlink()
    written = taken(write)
    arrays.clear()
    loaded = taken(lambda: [load_file(folder / name) for name in KINDS])
    return _figures(size, write=written, save=saved, load=loaded)


def turn_of_twintrain(folder: Path, arrays: dict[str, Arrays], size: int) -> dict[str, float]:
    """The portable format and its store, of one process."""
    from trainspec.checkpoints.copies import Copies
    from trainspec.checkpoints.manifest import read_manifest
    from trainspec.checkpoints.portable import PortableFormat
    from trainspec.checkpoints.shards import ShardFiles, as_shards, everything, files_of
    from trainspec.checkpoints.store import CheckpointStore, manifest_of
    from trainspec.checkpoints.verify import verify
    from trainspec.files.tensors import write_tensors
    from trainspec.recipe import Recipe
    from trainspec.runs.processes import Processes

    recipe = Recipe.model_validate({"model": {"from": "preset:tiny"}, "data": {"train": "none"}})
    shapes = {name: array.shape for name, array in arrays["weights"].items()}

    class Backend:
        def shards_of(self, state: Any, copy: Any) -> Any:
            copies = {kind: {n: copy(a) for n, a in each.items()} for kind, each in arrays.items()}
            return (shard for kind, each in copies.items() for shard in as_shards(kind, each))  # type: ignore[arg-type]

        def copied_bytes(self, state: Any) -> list[int]:
            return [array.nbytes for each in arrays.values() for array in each.values()]

    run: Any = SimpleNamespace(recipe=recipe)
    backend: Any = Backend()
    copies = Copies()
    portable = PortableFormat(backend, run, Processes(), copies=copies)
    store = CheckpointStore(
        folder, portable, manifest_of(recipe, None, shapes), recipe.checkpoint, Processes()
    )
    (folder / "plain").mkdir()

    def write() -> None:
        with ThreadPoolExecutor(len(KINDS)) as pool:  # as `write_shards` does
            list(
                pool.map(
                    lambda kind: write_tensors(arrays[kind], folder / "plain" / kind, flush=False), KINDS
                )
            )

    blocking: dict[int, float] = {}
    blocking_cores: dict[int, float] = {}

    def make_room() -> None:
        state: Any = SimpleNamespace(step=0)
        store.prepare(state)
        copies.wait()

    def save(step: int) -> None:
        state: Any = SimpleNamespace(step=step)
        began, used = time.perf_counter(), _cores()
        store.save(state)
        blocking[step], blocking_cores[step] = time.perf_counter() - began, _cores() - used
        store.wait()

    room, saved, again, written = (
        taken(make_room),
        taken(lambda: save(1)),
        taken(lambda: save(2)),
        taken(write),
    )
    arrays.clear()
    path = folder / "checkpoints/latest"

    def read() -> list[Arrays]:
        manifest = read_manifest(path)
        files = [
            ShardFiles([path / name for name in files_of(kind, manifest.digests)], shapes, where=path)  # type: ignore[arg-type]
            for kind in KINDS
        ]
        return [
            {name: each.read(name, everything(shape)) for name, shape in shapes.items()} for each in files
        ]

    loaded = taken(lambda: (verify(path), read()))
    figures = _figures(size, write=written, save=saved, load=loaded, read=taken(read))
    return figures | {
        "first_blocking": blocking[1] / saved.seconds,
        "first_blocking_cores": blocking_cores[1] / saved.core_seconds,
        "blocking": blocking[2] / again.seconds,
        "blocking_cores": blocking_cores[2] / again.core_seconds,
        "room_core_seconds": room.core_seconds,
        "save_memory": (room.growth_bytes + saved.growth_bytes) / size,
        "again": size / 1e9 / again.seconds,
        "again_core_seconds": again.core_seconds,
    }


def turn_of_orbax(folder: Path, arrays: dict[str, Arrays], size: int) -> dict[str, float]:
    """orbax's own checkpointer, which saves in the background; arrays of JAX."""
    import jax
    import orbax.checkpoint as ocp

    state = jax.tree.map(jax.numpy.asarray, arrays)
    arrays.clear()
    jax.block_until_ready(state)
    blocking = 0.0
    with ocp.StandardCheckpointer() as checkpointer:

        def save() -> None:
            nonlocal blocking
            began = time.perf_counter()
            checkpointer.save(folder.absolute() / "state", state)
            blocking = time.perf_counter() - began
            checkpointer.wait_until_finished()

        saved = taken(save)
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        loaded = taken(
            lambda: jax.block_until_ready(checkpointer.restore(folder.absolute() / "state", template))
        )
    return _figures(size, save=saved, load=loaded) | {"blocking": blocking / saved.seconds}


def turn_of_dcp(folder: Path, arrays: dict[str, Arrays], size: int) -> dict[str, float]:
    """torch.distributed.checkpoint without processes to distribute over."""
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load as load_into
    from torch.distributed.checkpoint.state_dict_saver import save

    state = {
        kind: {name: torch.from_numpy(array) for name, array in each.items()} for kind, each in arrays.items()
    }
    saved = taken(lambda: save(state, checkpoint_id=folder / "state", no_dist=True))

    def load() -> Any:
        empty = {
            kind: {name: torch.empty_like(each) for name, each in group.items()}
            for kind, group in state.items()
        }
        load_into(empty, checkpoint_id=folder / "state", no_dist=True)
        return empty

    return _figures(size, save=saved, load=taken(load))


if __name__ == "__main__":
    if "--worker" in sys.argv:
        os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    main()
