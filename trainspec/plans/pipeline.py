"""Pipeline parallelism in neutral words: which layers a stage holds, and how full a schedule keeps the stages.

A stage is one place of the mesh axis `pipe`. Under the schedules `gpipe` (arXiv 1811.06965) and `1f1b` (PipeDream-Flush,
arXiv 2006.09503) it holds one piece of the model; under `interleaved` (arXiv 2104.04473, section 2.2) it holds
`plan.chunks` pieces, and the model's pieces go round the stages. Schedules themselves are the backends'.
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


def partition_layers(layers: int, pieces: int) -> tuple[range, ...]:
    """The layers of each piece, in the model's order; where `pieces` do not divide, the first ones have one more.

    The last ones are the shorter, as the last stage has the head as well.
    """
    each, longer = divmod(layers, pieces)
    ends = [i * each + min(i, longer) for i in range(pieces + 1)]
    return tuple(range(start, end) for start, end in pairwise(ends))


def layer_stages(plan: Plan, layers: int) -> tuple[int, ...]:
    """The stage of each layer."""
    pieces = partition_layers(layers, plan.pipe * plan.pieces)
    return tuple(i % plan.pipe for i, piece in enumerate(pieces) for _ in piece)


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

    A stage has the first layer of each of its pieces, then the second of each, and so on: a loop over the layers of a
    piece takes what it needs without moving the weights of all pieces. None fills a piece up that is not the longest.
    """
    pieces = partition_layers(layers, plan.pipe * plan.pieces)
    return tuple(
        piece[k] if k < len(piece) else None
        for stage in range(plan.pipe)
        for k in range(len(pieces[0]))
        for piece in pieces[stage :: plan.pipe]
    )


@dataclass(frozen=True)
class Work:
    """What a stage does in a slot of time: a pass over one of its pieces, of one microbatch."""

    kind: Literal["forward", "backward"]
    microbatch: int
    piece: int = 0


# For every stage what it does in each slot, None where it waits; a forward and a backward pass take a slot each.
Timeline = tuple[tuple[Work | None, ...], ...]


def bubble(timeline: Timeline) -> Fraction:
    """The share of slots in which a stage does nothing that is kept."""
    slots = [work for stage in timeline for work in stage]
    return Fraction(slots.count(None), len(slots))
