"""What a run costs one device, read from its compiled programs: bytes held, and bytes moved to other devices."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.stages import Lowered

from jaxtrain.optim import rates
from jaxtrain.step import State
from trainspec.data import Batch
from trainspec.recipe import Recipe

_ELEMENT_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
_ARRAY = re.compile(rf"\b({'|'.join(_ELEMENT_BYTES)})\[([\d,]*)\]")
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
# `%name = TYPES KIND(OPERANDS), ..., replica_groups=...`
_COLLECTIVE = re.compile(rf"= (?P<types>\S.*?) (?P<kind>{_KINDS})(?:-start)?\((?P<rest>.*)")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{\s*$")
_WHILE = re.compile(r" while\(.*condition=%?(?P<condition>[\w.\-]+), body=%?(?P<body>[\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BOUND = re.compile(r"[su](?:32|64)\[\]\S* constant\((\d+)\)")
# Groups are written as axes of a mesh, as a product of sizes, or one by one.
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\].*? \{(?P<axes>'[^}]*)\}")
_SIZED_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
# Programs give back their results through a table of pointers.
_POINTER_BYTES = 8


@dataclass(frozen=True)
class Collective:
    """An operation between devices: `payload_bytes` is the whole of what is reduced or gathered, as one device sees it.

    Rings move payload · (n - 1) / n for an all-gather or a reduce-scatter over n `devices`, twice that for an all-reduce.
    """

    program: str
    kind: str
    dtype: str
    payload_bytes: int
    devices: int
    times: int


def held(state: State) -> dict[str, int]:
    """Bytes per device of weights, gradients, master and moments, and what each program takes besides (`..._temp`).

    Measured: the sizes of the compiled programs' arguments and results, less those of batch and scalars.
    """
    program, batch = state.program, _any_batch(state.program.recipe)
    gradients, update = (lowered.compile() for lowered in _lowered(state, batch).values())
    sizes, update_sizes = gradients.memory_analysis(), update.memory_analysis()
    assert sizes is not None  # every backend that trains has it
    assert update_sizes is not None
    results = jax.tree.leaves(gradients.out_info)
    gradient_bytes = sizes.output_size_in_bytes - _POINTER_BYTES * len(results) - _scalar_bytes(results)
    rest = _per_device(state.trainable) + gradient_bytes + _scalar_bytes(update.in_avals)
    stored = update_sizes.argument_size_in_bytes - rest
    inputs = _per_device(program.microbatches(batch)) + _scalar_bytes(gradients.in_avals)
    moments = stored * 2 // 3 if state.master else stored
    return {
        "weights": sizes.argument_size_in_bytes - inputs,
        "gradients": gradient_bytes,
        "master": stored - moments,
        "moments": moments,
        "gradients_temp": sizes.temp_size_in_bytes,
        "update_temp": update_sizes.temp_size_in_bytes,
    }


def moved(state: State, batch: Batch) -> list[Collective]:
    """The collectives of one step on `batch`, those of a loop as often as it turns.

    Read from the partitioned program: the CPU backend makes every bfloat16 collective a float32 one afterwards.
    """
    return [
        collective
        for name, lowered in _lowered(state, batch).items()
        for collective in _collectives(_partitioned(lowered), program=name)
    ]


def _partitioned(lowered: Lowered) -> str:
    """The program of one device as text, collectives and all; empty where there is one device only."""
    with tempfile.TemporaryDirectory() as directory, _without_cache():
        lowered.compile(
            compiler_options={"xla_dump_to": directory, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        )
        return "".join(p.read_text() for p in Path(directory).glob("*after_spmd-partitioning*.txt"))


@contextmanager
def _without_cache() -> Iterator[None]:
    """What comes out of the compilation cache is not dumped."""
    before: bool = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()  # JAX looks at the setting once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


def _collectives(text: str, *, program: str) -> Iterator[Collective]:
    """Every collective of an HLO module that runs, with how often it does."""
    computations, entry = _computations(text)
    for line, times in _executed(computations, entry, 1):
        if match := _COLLECTIVE.search(line):
            devices, arrays = _group_size(match["rest"]), _ARRAY.findall(match["types"])
            payload = sum(
                _ELEMENT_BYTES[dtype] * prod(map(int, filter(None, dims.split(","))))
                for dtype, dims in arrays
            )
            if match["kind"] == "reduce-scatter":
                payload *= devices  # its result is a part
            yield Collective(program, match["kind"], arrays[0][0], payload, devices, times)


def _lowered(state: State, batch: Batch) -> dict[str, Lowered]:
    """The programs of one step."""
    program, step = state.program, jnp.int32(state.step)
    arguments = (state.trainable, state.frozen, program.microbatches(batch), step)
    gradients = program.gradients.lower(*arguments, listen=False)
    found = jax.eval_shape(lambda *args: program.gradients(*args, listen=False), *arguments)
    shardings = program.layout.of["gradients"]
    summed = {
        name: jax.ShapeDtypeStruct(g.shape, g.dtype, sharding=shardings[name])
        for name, g in found.gradients.items()
    }
    scalars = rates(program.recipe.optimizer, lr=program.recipe.optimizer.lr, step=state.step)
    update = program.update.lower(state.trainable, state.master, state.moments, summed, found.norm, scalars)
    return {"gradients": gradients, "update": update}


def _any_batch(recipe: Recipe) -> Batch:
    """A batch of the recipe's shape."""
    rows = np.zeros((recipe.batch.global_examples, recipe.data.sequence_tokens), np.int32)
    return Batch(rows, rows, rows, rows, rows[:, 0])


def _per_device(arrays: Any) -> int:
    """Bytes of a tree of arrays on one device."""
    return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(arrays))


def _scalar_bytes(arguments: Any) -> int:
    return sum(a.dtype.itemsize for a in jax.tree.leaves(arguments) if a.ndim == 0)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and which is entered first."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
            name = head["name"]
            entry = name if head["entry"] else entry
            computations[name] = []
        elif name:
            computations[name].append(line)
    return computations, entry


def _executed(computations: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
    """Every line that runs, and how often."""
    for line in computations.get(name, ()):
        yield line, times
        if loop := _WHILE.search(line):
            bound = _BOUND.search("\n".join(computations[loop["condition"]]))
            assert bound is not None, f"{loop['condition']}: a loop without a constant bound"
            yield from _executed(computations, loop["body"], times * int(bound[1]))
        else:
            for called in _CALLED.findall(line):
                yield from _executed(computations, called, times)


def _group_size(text: str) -> int:
    """Over how many devices one collective goes."""
    if mesh := _MESH_GROUPS.search(text):
        sizes = dict(axis.replace("'", "").split("=") for axis in mesh["sizes"].split(","))
        return prod(int(sizes[axis.strip().strip("'")]) for axis in mesh["axes"].split(","))
    if sized := _SIZED_GROUPS.search(text):
        return int(sized[1])
    listed = _LISTED_GROUPS.search(text)
    assert listed is not None, f"no replica groups in {text}"
    return len(listed[1].split(","))
