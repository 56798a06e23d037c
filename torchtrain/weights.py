"""Canonical names and numpy arrays <-> the tensors of this backend.

Linear weights are [out, in] on both sides, so only names differ. Canonical are Hugging Face's names and, for
adapters, those of PEFT's files; in memory PEFT names the adapter and tucks the adapted layer into `base_layer`:

    model.layers.0.self_attn.q_proj.weight                             ...q_proj.base_layer.weight
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight     ...q_proj.lora_A.default.weight
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from trainspec.methods import PEFT_PREFIX
from trainspec.params import Param


def canonical_name(native: str) -> str:
    """The table's name of the parameter that the module calls `native`."""
    if ".lora_" in native:
        return PEFT_PREFIX + native.replace(".default.", ".")
    return native.replace(".base_layer.", ".")


@torch.no_grad()
def from_canonical(
    weights: Iterable[tuple[Param, NDArray[Any]]], native: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Fill `native`, keyed by the module's names, tensor by tensor and in place.

    Differs from jaxtrain, which makes its arrays here: torch's are allocated with the module.
    """
    tensors = {canonical_name(name): tensor for name, tensor in native.items()}
    for param, array in weights:
        tensors.pop(param.name).copy_(torch.from_numpy(array))
    assert not tensors, f"no value for {sorted(tensors)}"  # THE TABLE names every parameter of the module
    return native


def to_canonical(native: Mapping[str, Tensor], table: Sequence[Param]) -> dict[str, NDArray[Any]]:
    """Copies of the rows of `table`, as numpy arrays; `native` is keyed by the module's names."""
    tensors = {canonical_name(name): tensor for name, tensor in native.items()}
    return {p.name: tensors[p.name].detach().cpu().numpy().copy() for p in table}
