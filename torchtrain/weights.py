"""Canonical names and numpy arrays <-> the tensors of this backend.

Linear weights are [out, in] on both sides, so only names differ. Canonical are Hugging Face's names and, for
adapters, those of PEFT's files; in memory PEFT names the adapter and tucks the adapted layer into `base_layer`:

    model.layers.0.MODULE.weight                             ...MODULE.base_layer.weight
    base_model.model.model.layers.0.MODULE.lora_A.weight     ...MODULE.lora_A.default.weight

A process of a tensor-parallel group holds one part of a row, contiguous along the dimension that is split. A stage of a
pipeline holds the rows that it computes with; the others stay on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.tensor import Mesh, Peers, compute_device, is_split, to_numpy
from trainspec.methods import PEFT_PREFIX
from trainspec.params import Param
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
    """Give this process's part of each of its rows to `write`, with its parameter; `native` has the module's names.

    Differs from jaxtrain, which makes its arrays here: torch's are there already, and the engine knows where.
    """
    parameters = {canonical_name(name): parameter for name, parameter in native.items()}
    for param, weight in weights:
        parameter = parameters.pop(param.name)
        if not parameter.is_meta:
            write(parameter, torch.from_numpy(weight[_part(param, tensor)]))
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
    """Copies of the rows of `table` as whole numpy arrays, one at a time; {} where they are not to be kept.

    `read` gives this process's part of a row, where the process is of the row's `stage`. All processes have to come,
    as parts are gathered and stages share what they have.
    """
    parameters = {canonical_name(name): parameter for name, parameter in native.items()}
    found = {}
    for param in table:
        mine = None
        if mesh.stages.index == stage(param):
            mine = _gathered(param, read(parameters[param.name]).detach(), mesh.tensor)
        whole = mesh.stages.share(mine, stage(param))
        if keep:
            found[param.name] = to_numpy(whole).copy()
    return found


def _gathered(param: Param, part: Tensor, tensor: Peers) -> Tensor:
    """A whole row from its parts."""
    for dim, axis in enumerate(param.axes):
        if is_split(axis):
            part = tensor.gather(part, dim)
    return part


def allocate(
    model: PreTrainedModel,
    weights: Iterable[tuple[Param, Weight]],
    *,
    dtype: torch.dtype,
    tensor: Peers,
    is_mine: Callable[[Param], bool],
    settle: Callable[[nn.Parameter], None],
) -> None:
    """Put weights into a module that is on the meta device, one after the other.

    Only this process's part of its rows is read. `settle` may give memory of a parameter back before the next one
    gets its own.
    """
    names = {canonical_name(name): name for name, _ in model.named_parameters()}
    for param, weight in weights:
        name = names.pop(param.name)
        if not is_mine(param):
            continue
        array = weight[_part(param, tensor)]
        value = torch.from_numpy(array).to(compute_device(), dtype)
        parameter = nn.Parameter(value, requires_grad=model.get_parameter(name).requires_grad)
        if tensor.size > 1 and any(map(is_split, param.axes)):
            # What DeepSpeed reads to count each element of the global norm once.
            parameter.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameter)
        settle(parameter)
    assert not names, f"no value for {sorted(names)}"
    model.tie_weights()  # a tied head still has the embedding's meta tensor


def _part(param: Param, tensor: Peers) -> Index:
    """The slices of a row that this process holds."""
    slices = []
    for size, axis in zip(param.shape, param.axes, strict=True):
        each = size // tensor.size
        mine = slice(tensor.index * each, (tensor.index + 1) * each)
        slices.append(mine if is_split(axis) else slice(None))
    return tuple(slices)
