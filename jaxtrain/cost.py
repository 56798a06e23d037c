"""What a run costs one device, read from its compiled programs: bytes of memory, and bytes sent to other devices."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Lowered

from jaxtrain import _jax
from jaxtrain.optim import rates
from jaxtrain.precision import accumulation_dtype
from jaxtrain.step import State
from trainspec.data import Batch
from trainspec.plans.cost import Collective

_ELEMENT_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
_ARRAY = re.compile(rf"\b({'|'.join(_ELEMENT_BYTES)})\[([\d,]*)\]")
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
# `%name = TYPES OPERATION(OPERANDS), ..., replica_groups=...`
_INSTRUCTION = re.compile(r"%?(?P<name>[\w.\-]+) = (?P<types>\S.*?) (?P<operation>[\w\-]+)\((?P<rest>.*)")
_COLLECTIVE = re.compile(rf"(?P<kind>{_KINDS})(?:-start)?")
_OPERAND = re.compile(r"%([\w.\-]+)")
# Operations that may be between an all-reduce and the slice of its result.
_SAME_NUMBERS = ("copy", "reshape", "bitcast")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{\s*$")
_WHILE = re.compile(r" while\(.*condition=%?(?P<condition>[\w.\-]+), body=%?(?P<body>[\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BOUND = re.compile(r"[su](?:32|64)\[\]\S* constant\((\d+)\)")
# Groups are written as axes of a mesh, as a product of sizes, or one by one.
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[(?P<sizes>[^\]]*)\].*? \{(?P<axes>'[^}]*)\}")
_SIZED_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_PAIRS = "source_target_pairs="
# A program returns its results through a table of pointers.
_POINTER_BYTES = 8


def held(state: State, batch: Batch) -> dict[str, int]:
    """Bytes per device, in a step on `batch`, of weights, gradients, master and moments, and of each program's scratch memory.

    Weights, gradients and scratch memory (`..._temp`) are from the compiled programs' memory analysis, less batch and
    scalars; master and moments are the sizes of the arrays that the update takes.
    """
    gradients, update = (lowered.compile() for lowered in _lowered(state, batch).values())
    sizes, update_sizes = gradients.memory_analysis(), update.memory_analysis()
    # Every backend that trains has it.
    assert sizes is not None
    assert update_sizes is not None
    results = jax.tree.leaves(gradients.out_info)
    inputs = _per_device(state.program.feeder.slices(batch)) + _scalar_bytes(gradients.in_avals)
    return {
        "weights": sizes.argument_size_in_bytes - inputs,
        "gradients": sizes.output_size_in_bytes - _POINTER_BYTES * len(results) - _scalar_bytes(results),
        "master": _per_device(state.master),
        "moments": _per_device(state.moments),
        "gradients_temp": sizes.temp_size_in_bytes,
        "update_temp": update_sizes.temp_size_in_bytes,
    }


def moved(state: State, batch: Batch) -> list[Collective]:
    """The collectives of one step on `batch`, each with the number of times it runs.

    Read from the partitioned program, as the CPU backend later turns bfloat16 collectives into float32 ones. An all-reduce
    whose result is only sliced by each device is counted as a reduce-scatter, as the compilers for TPU and GPU emit it
    (docs/decisions/0009); the one for CPU does not.
    """
    return [
        collective
        for name, lowered in _lowered(state, batch).items()
        for collective in _collectives(_partitioned(lowered), program=name)
    ]


def _partitioned(lowered: Lowered) -> str:
    """The program of one device as text, after collectives were inserted; empty if there is only one device."""
    with tempfile.TemporaryDirectory() as directory, _without_cache():
        lowered.compile(
            compiler_options={"xla_dump_to": directory, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        )
        return "".join(
            p.read_text(encoding="utf-8") for p in Path(directory).glob("*after_spmd-partitioning*.txt")
        )


@contextmanager
def _without_cache() -> Iterator[None]:
    """Without the compilation cache: a program that it has is not dumped."""
    before: bool = _jax.setting("jax_enable_compilation_cache")
    try:
        _jax.use_compilation_cache(False)
        yield
    finally:
        _jax.use_compilation_cache(before)


def _collectives(text: str, *, program: str) -> Iterator[Collective]:
    """The collectives that an HLO module runs, each with the number of times."""
    computations, entry = _computations(text)
    scattered = {name for lines in computations.values() for name in _only_sliced(lines)}
    for line, times in _executed(computations, entry, 1):
        instruction = _INSTRUCTION.search(line)
        if instruction and (match := _COLLECTIVE.fullmatch(instruction["operation"])):
            kind, devices = match["kind"], _group_size(instruction["rest"])
            payload = _bytes(instruction["types"])
            if instruction["name"] in scattered:
                kind = "reduce-scatter"
            elif kind == "reduce-scatter":
                # Its result is one shard.
                payload *= devices
            dtype = _ARRAY.findall(instruction["types"])[0][0]
            yield Collective(program, kind, dtype, payload, devices, times)


def _only_sliced(lines: Iterable[str]) -> Iterator[str]:
    """Names of a computation's all-reduces of whose results every device uses its own n-th only."""
    instructions = [match for match in map(_INSTRUCTION.search, lines) if match]
    users: dict[str, list[re.Match[str]]] = {}
    for instruction in instructions:
        for operand in _OPERAND.findall(instruction["rest"].partition(")")[0]):
            users.setdefault(operand, []).append(instruction)
    for instruction in instructions:
        if instruction["operation"] != "all-reduce":
            continue
        user = _only_user(instruction, users)
        shard_bytes = _bytes(instruction["types"]) // _group_size(instruction["rest"])
        if user and user["operation"] == "dynamic-slice" and _bytes(user["types"]) == shard_bytes:
            yield instruction["name"]


def _only_user(
    instruction: re.Match[str], users: Mapping[str, Sequence[re.Match[str]]]
) -> re.Match[str] | None:
    """The one instruction that uses this one's result, perhaps copied or reshaped; None if it is not one."""
    of_result = users.get(instruction["name"], ())
    if len(of_result) != 1:
        return None
    [user] = of_result
    return _only_user(user, users) if user["operation"] in _SAME_NUMBERS else user


def _bytes(types: str) -> int:
    """Bytes of an HLO type: of an array, or of all arrays of a tuple."""
    arrays = _ARRAY.findall(types)
    return sum(
        _ELEMENT_BYTES[dtype] * prod(map(int, filter(None, dims.split(",")))) for dtype, dims in arrays
    )


def _lowered(state: State, batch: Batch) -> dict[str, Lowered]:
    """The two programs of a step whose gradients are kept; otherwise a step is one program."""
    program, step = state.program, jnp.int32(state.step)
    arguments = (state.trainable, state.frozen, program.feeder.slices(batch), step)
    gradients = program.gradients.lower(*arguments, record_activations=False)
    storage = program.storage
    summed = storage.shapes(program.run.trained, "gradients", storage.reduce_dtype)
    norm = jax.ShapeDtypeStruct((), accumulation_dtype(storage.compute_dtype))
    scalars = rates(program.recipe.optimizer, lr=program.recipe.optimizer.lr, step=state.step)
    update = program.update.lower(state.trainable, state.master, state.moments, summed, norm, scalars)
    return {"gradients": gradients, "update": update}


def _per_device(arrays: Any) -> int:
    """Bytes on one device of a tree of arrays."""
    return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(arrays))


def _scalar_bytes(arguments: Any) -> int:
    return sum(a.dtype.itemsize for a in jax.tree.leaves(arguments) if a.ndim == 0)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and the name of the entry computation."""
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
    """Every line that runs, and the number of times."""
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
    """The number of devices in each group of a collective."""
    if _PAIRS in text:
        return 2
    if mesh := _MESH_GROUPS.search(text):
        sizes = dict(axis.replace("'", "").split("=") for axis in mesh["sizes"].split(","))
        return prod(int(sizes[axis.strip().strip("'")]) for axis in mesh["axes"].split(","))
    if sized := _SIZED_GROUPS.search(text):
        return int(sized[1])
    listed = _LISTED_GROUPS.search(text)
    assert listed is not None, f"no replica groups in {text}"
    return len(listed[1].split(","))
