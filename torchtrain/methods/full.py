"""Full training changes nothing of the model."""

from __future__ import annotations

from transformers import LlamaForCausalLM

from torchtrain.methods.site import Site
from trainspec.methods import Full


def attach(model: LlamaForCausalLM, method: Full, site: Site) -> None:
    """Nothing."""
