"""Pipeline parallelism in neutral words: which layers a stage holds, and how full a schedule keeps the stages.

A stage is one place of the mesh axis `pipe`. Under the schedules `gpipe` (arXiv 1811.06965) and `1f1b` (PipeDream-Flush,
arXiv 2006.09503) it holds one chunk of the model; under `interleaved` (arXiv 2104.04473, section 2.2) it holds
`plan.chunks` chunks, and the model's chunks go round the stages. Schedules themselves are the backends'.
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
    """The layers of each chunk, in the model's order; where `chunks` do not divide, the first ones have one more.

    The last ones are the shorter, as the last stage has the head as well.
    """
    each, longer = divmod(layers, chunks)
    ends = [i * each + min(i, longer) for i in range(chunks + 1)]
    return tuple(range(start, end) for start, end in pairwise(ends))


def layer_stages(plan: Plan, layers: int) -> tuple[int, ...]:
    """The stage of each layer."""
    chunks = partition_layers(layers, plan.pipe * plan.chunks_per_stage)
    return tuple(i % plan.pipe for i, chunk in enumerate(chunks) for _ in chunk)


def stages_of(param: Param, plan: Plan, model: ModelSpec) -> tuple[int, ...]:
    """The stages that compute with a row of the table: one, but for an embedding that is the head as well.

    Each stage makes the prefix of all layers and takes that of its own. The rows of a prompt enter at the first.
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
    """The layer at each place of a stack of layers that is cut into as many equal parts as there are stages.

    A stage has the first layer of each of its chunks, then the second of each, and so on: a loop over the layers of a
    chunk takes what it needs without moving the weights of all chunks. None fills a chunk up that is not the longest.
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
    """What a stage does in a slot of time: a pass over one of its chunks, of one microbatch."""

    kind: Literal["forward", "backward"]
    microbatch: int
    chunk: int = 0


# For every stage what it does in each slot, None where it waits; a forward and a backward pass take a slot each.
Timeline = tuple[tuple[Work | None, ...], ...]


def bubble(timeline: Timeline) -> Fraction:
    """The share of slots in which a stage does nothing that is kept."""
    slots = [work for stage in timeline for work in stage]
    return Fraction(slots.count(None), len(slots))
