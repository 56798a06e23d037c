"""Full training changes nothing of the model."""

from __future__ import annotations

from transformers import PreTrainedModel

from torchtrain.methods.site import Site
from trainspec.methods import Full


def attach(model: PreTrainedModel, method: Full, site: Site) -> None:
    """Nothing."""
