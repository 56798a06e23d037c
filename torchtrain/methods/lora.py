"""LoRA: PEFT's layers, which hold the linear ones that they replace."""

from __future__ import annotations

from transformers import PreTrainedModel

from torchtrain.methods.low_rank import replace_targets
from torchtrain.methods.site import Site
from trainspec.methods import LoRA


def attach(model: PreTrainedModel, method: LoRA, site: Site) -> None:
    """Replace each target by PEFT's layer."""
    replace_targets(model, method, site)
