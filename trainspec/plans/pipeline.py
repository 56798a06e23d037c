"""Pipeline parallelism whatever the backend: which layers a stage holds, and how busy a schedule keeps the stages.

A stage is one position along the mesh axis `pipe`. Under the schedules `gpipe` (arXiv 1811.06965) and `1f1b`
(PipeDream-Flush, arXiv 2006.09503) it holds one model chunk; under `interleaved` (arXiv 2104.04473, section 2.2) it holds
`plan.chunks`, dealt to the stages in turn. The schedules themselves are in the backends.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from trainspec.methods import ENCODER
from trainspec.model import ModelSpec
from trainspec.params import Param
from trainspec.plans.plan import Plan

# The logical axes of an encoder that makes every layer's keys and values.
PREFIX_ENCODER_AXES = frozenset({"prefix", "prefix_hidden"})


def partition_layers(layers: int, chunks: int) -> tuple[range, ...]:
    """The layers of each chunk, in the model's order. If `chunks` does not divide `layers`, the first ones have one more:
    the last stage also has the head.
    """
    each, longer = divmod(layers, chunks)
    ends = [i * each + min(i, longer) for i in range(chunks + 1)]
    return tuple(range(start, end) for start, end in pairwise(ends))


def layer_stages(plan: Plan, layers: int) -> tuple[int, ...]:
    """The stage of each layer."""
    chunks = partition_layers(layers, plan.pipe * plan.chunks_per_stage)
    return tuple(i % plan.pipe for i, chunk in enumerate(chunks) for _ in chunk)


def stages_of(param: Param, plan: Plan, model: ModelSpec) -> tuple[int, ...]:
    """The stages that use a weight: one, except for an embedding that is also the head and for a prefix encoder.

    Every stage makes the prefix of all layers and uses its own. A prompt enters at the first stage.
    """
    last = plan.pipe - 1
    if PREFIX_ENCODER_AXES.intersection(param.axes):
        return tuple(range(plan.pipe))
    if param.module.startswith(ENCODER):
        return (0,)
    if param.layer is not None:
        return (layer_stages(plan, model.layers)[param.layer],)
    if param.role == "embedding":
        return (0, last) if model.tied_embeddings and last > 0 else (0,)
    return (last,)


def stack_order(plan: Plan, layers: int) -> tuple[int | None, ...]:
    """The layer at each position of a stack of layers, of which each stage holds an equal, contiguous slice.

    A stage has the first layer of each of its chunks, then the second of each, and so on: a loop over the layers of one
    chunk then takes them without moving the weights of all chunks. Shorter chunks are padded with None.
    """
    chunks = partition_layers(layers, plan.pipe * plan.chunks_per_stage)
    return tuple(
        chunk[k] if k < len(chunk) else None
        for stage in range(plan.pipe)
        for k in range(len(chunks[0]))
        for chunk in chunks[stage :: plan.pipe]
    )


@dataclass(frozen=True)
class Work:
    """What a stage does in a time slot: a forward or backward pass of one microbatch through one of its chunks."""

    kind: Literal["forward", "backward"]
    microbatch: int
    chunk: int = 0


# The work of each stage in each time slot, None where it waits. A forward and a backward pass take one slot each.
Timeline = tuple[tuple[Work | None, ...], ...]


def bubble(timeline: Timeline) -> Fraction:
    """The share of slots in which a stage is idle."""
    slots = [work for stage in timeline for work in stage]
    return Fraction(slots.count(None), len(slots))
