"""Full training: the model is trained as it is."""

from __future__ import annotations

from transformers import PreTrainedModel

from torchtrain.methods.site import Site
from trainspec.methods import Full


def attach(model: PreTrainedModel, method: Full, site: Site) -> None:
    """There is nothing to attach."""
