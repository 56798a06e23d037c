"""Canonical names and numpy arrays <-> the tensors of this backend.

Linear weights are [out, in] on both sides, so only names differ. Canonical are Hugging Face's names and, for
adapters, those of PEFT's files; in memory PEFT names the adapter and puts the adapted layer into `base_layer`:

    model.layers.0.MODULE.weight                             ...MODULE.base_layer.weight
    base_model.model.model.layers.0.MODULE.lora_A.weight     ...MODULE.lora_A.default.weight

A tensor peer holds one shard of a weight, contiguous along the dimension that is split; of a dimension with several parts
(`trainspec.plans.plan.PARTS`) one shard of each, joined. A stage of a pipeline holds the
weights that it computes with; the others stay on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from trainspec.methods import PEFT_PREFIX
from trainspec.params import Param
from trainspec.plans.plan import PARTS
from trainspec.weight import Index, Weight, WeightLike


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
    write: Callable[[nn.Parameter, Tensor], None],
) -> None:
    """Call `write` with each parameter and this process's shard of its weight; `native` has the module's names.

    Differs from jaxtrain, which makes its arrays here: torch's exist already, and the engine knows where.
    """
    parameters = {canonical_name(name): parameter for name, parameter in native.items()}
    for param, weight in weights:
        parameter = parameters.pop(param.name)
        if not parameter.is_meta:
            write(parameter, torch.from_numpy(_shard(param, weight, tensor)))
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


def _shard(param: Param, weight: WeightLike, tensor: Peers) -> NDArray[Any]:
    """What this process holds of a weight: of a dimension with parts its share of each."""
    joined = [dim for dim, axis in enumerate(param.axes) if axis in PARTS]
    if tensor.size == 1 or not joined:
        return weight[_shard_index(param, tensor)]
    parts = range(PARTS[param.axes[joined[0]]])
    return np.concatenate([weight[_shard_index(param, tensor, part)] for part in parts], joined[0])


def _shard_index(param: Param, tensor: Peers, part: int = 0) -> Index:
    """The slices of a weight that this process holds, of a dimension with parts those of one `part`."""
    slices = []
    for size, axis in zip(param.shape, param.axes, strict=True):
        parts = PARTS.get(axis, 1) if tensor.size > 1 else 1
        each = size // (tensor.size * parts)
        first = (part * tensor.size if parts > 1 else 0) + tensor.index
        slices.append(slice(first * each, (first + 1) * each) if is_split(axis) else slice(None))
    return tuple(slices)
