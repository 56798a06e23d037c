"""Full training changes nothing of the model."""

from __future__ import annotations

import numpy as np

from jaxtrain.methods.site import Site
from jaxtrain.model import Llama
from trainspec.methods import Full


def attach(model: Llama, method: Full, site: Site) -> dict[str, np.ndarray]:
    """Nothing."""
    return {}
