"""Canonical names and numpy arrays <-> the tensors of this backend.

Linear weights are [out, in] on both sides, so only names differ. Canonical are Hugging Face's names and, for
adapters, those of PEFT's files; in memory PEFT names the adapter and puts the adapted layer into `base_layer`:

    model.layers.0.MODULE.weight                             ...MODULE.base_layer.weight
    base_model.model.model.layers.0.MODULE.lora_A.weight     ...MODULE.lora_A.default.weight

A tensor peer holds one shard of a weight, contiguous along the dimension that is split; of a dimension with several parts
(`trainspec.plans.plan.PARTS`) one shard of each, joined. A stage of a pipeline holds the
weights that it computes with; the others stay on the meta device. Replicas may share out the elements of a shard, in row-major
order whatever its dimensions: `Elements` reads a stretch of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain._deepspeed import mark_tensor_parallel
from torchtrain.mesh import Mesh, Peers, compute_device
from torchtrain.precision import to_numpy
from torchtrain.tensor_parallel import gather_axis, is_split
from trainspec.checkpoints.shards import ArrayKind, Shape, Shard, boxes, everything
from trainspec.methods import PEFT_PREFIX
from trainspec.params import Param
from trainspec.plans.plan import PARTS
from trainspec.weight import Index, Weight, WeightLike

# Reads the elements from the first number up to the second of this process's shard of a weight, in row-major order.
Elements = Callable[[int, int], Tensor]


def canonical_name(native: str) -> str:
    """The table's name of the parameter that the module calls `native`."""
    if ".lora_" in native:
        return PEFT_PREFIX + native.replace(".default.", ".")
    return native.replace(".base_layer.", ".")


def from_canonical(
    weights: Iterable[tuple[Param, WeightLike]],
    native: Mapping[str, nn.Parameter],
    *,
    tensor: Peers,
    write: Callable[[nn.Parameter, Elements], None],
) -> None:
    """Call `write` with each parameter and what reads its weight's elements; `native` has the module's names.

    Differs from jaxtrain, which makes its arrays here: torch's exist already, and the engine knows where, and which elements
    this process needs.
    """
    parameters = {canonical_name(name): parameter for name, parameter in native.items()}
    for param, weight in weights:
        parameter = parameters.pop(param.name)
        if not parameter.is_meta:
            write(parameter, _reader(param, weight, tensor))
    # The table names every parameter of the module.
    assert not parameters, f"no value for {sorted(parameters)}"


def to_canonical(
    native: Mapping[str, nn.Parameter],
    table: Sequence[Param],
    *,
    mesh: Mesh,
    stage: Callable[[Param], int],
    read: Callable[[nn.Parameter], Tensor],
    keep: bool,
) -> dict[str, NDArray[Any]]:
    """Copies of the weights in `table` as whole numpy arrays, one at a time; {} unless `keep`.

    `read` gives this process's shard of a weight, on the weight's `stage`. All processes have to call: shards are
    gathered, and stages share the result.
    """
    parameters = {canonical_name(name): parameter for name, parameter in native.items()}
    arrays = {}
    for param in table:
        mine = None
        if mesh.stages.index == stage(param):
            mine = _gathered(param, read(parameters[param.name]).detach(), mesh.tensor)
        whole = mesh.stages.share(mine, stage(param))
        if keep:
            arrays[param.name] = to_numpy(whole).copy()
    return arrays


def _gathered(param: Param, shard: Tensor, tensor: Peers) -> Tensor:
    """A whole weight from its shards."""
    for dim, axis in enumerate(param.axes):
        if is_split(axis):
            shard = gather_axis(shard, dim, axis, tensor)
    return shard


def allocate(
    model: PreTrainedModel,
    weights: Iterable[tuple[Param, Weight]],
    *,
    dtype: torch.dtype,
    tensor: Peers,
    is_mine: Callable[[Param], bool],
    shard: Callable[[nn.Parameter], None],
) -> None:
    """Put weights into a module that is on the meta device, one after the other.

    Only this process's shards of its stage's weights are read. `shard` is called with each parameter, and may free some of
    its memory before the next one is read.
    """
    names = {canonical_name(name): name for name, _ in model.named_parameters()}
    for param, weight in weights:
        name = names.pop(param.name)
        if not is_mine(param):
            continue
        value = torch.from_numpy(_shard(param, weight, tensor)).to(compute_device(), dtype)
        parameter = nn.Parameter(value, requires_grad=model.get_parameter(name).requires_grad)
        if tensor.size > 1 and any(map(is_split, param.axes)):
            mark_tensor_parallel(parameter)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameter)
        shard(parameter)
    assert not names, f"no value for {sorted(names)}"
    model.tie_weights()  # a tied head still has the embedding's meta tensor


def shards(
    kind: ArrayKind, param: Param, first: int, elements: NDArray[Any], *, tensor: Peers
) -> Iterator[Shard]:
    """The boxes of a weight that consecutive `elements` of this process's shard of it are, those from `first` on."""
    for box in boxes(_shard_shape(param, tensor), first, first + len(elements)):
        sizes = [s.stop - s.start for s in box]
        array, elements = elements[: math.prod(sizes)].reshape(sizes), elements[math.prod(sizes) :]
        for place, index in _in_whole(param, box, tensor):
            yield Shard(kind, param.name, param.shape, index, array[place])


def _reader(param: Param, weight: WeightLike, tensor: Peers) -> Elements:
    shape = _shard_shape(param, tensor)

    def read(first: int, end: int) -> Tensor:
        found = [_read(param, weight, box, tensor).reshape(-1) for box in boxes(shape, first, end)]
        return torch.from_numpy(found[0] if len(found) == 1 else np.concatenate([*found, _nothing(weight)]))

    return read


def _nothing(weight: WeightLike) -> NDArray[Any]:
    return np.empty(0, weight.dtype)


def _shard(param: Param, weight: WeightLike, tensor: Peers) -> NDArray[Any]:
    """What this process holds of a weight: of a dimension with parts its share of each."""
    return _read(param, weight, everything(_shard_shape(param, tensor)), tensor)


def _read(param: Param, weight: WeightLike, box: Index, tensor: Peers) -> NDArray[Any]:
    """The `box` of this process's shard."""
    pieces = [*_in_whole(param, box, tensor)]
    if len(pieces) == 1:
        return weight[pieces[0][1]]
    joined = np.empty([s.stop - s.start for s in box], weight.dtype)
    for place, index in pieces:
        joined[place] = weight[index]
    return joined


def _shard_shape(param: Param, tensor: Peers) -> Shape:
    """The shape of what this process holds of a weight."""
    sizes = zip(param.shape, param.axes, strict=True)
    return tuple(size // tensor.size if is_split(axis) else size for size, axis in sizes)


def _in_whole(param: Param, box: Index, tensor: Peers) -> Iterator[tuple[Index, Index]]:
    """The boxes of the whole weight that a `box` of this process's shard consists of, each with its place in `box` first."""
    along = [_along(*each, tensor) for each in zip(param.shape, param.axes, box, strict=True)]
    for pieces in product(*along):
        yield tuple(place for place, _ in pieces), tuple(index for _, index in pieces)


def _along(size: int, axis: str, held: slice, tensor: Peers) -> Iterator[tuple[slice, slice]]:
    """`_in_whole` of one dimension: more than one where it has parts."""
    if tensor.size == 1 or not is_split(axis):
        yield slice(0, held.stop - held.start), held
        return
    parts = PARTS.get(axis, 1)
    each = size // (tensor.size * parts)
    for part in range(parts):
        first, end = max(held.start, part * each), min(held.stop, (part + 1) * each)
        moved = (part * (tensor.size - 1) + tensor.index) * each
        if first < end:
            yield slice(first - held.start, end - held.start), slice(first + moved, end + moved)
