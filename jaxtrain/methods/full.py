"""Full training: the model stays as it is."""

from __future__ import annotations

import numpy as np

from jaxtrain.decoder import Decoder
from jaxtrain.methods.site import Site
from trainspec.methods import Full


def attach(model: Decoder, method: Full, site: Site) -> dict[str, np.ndarray]:
    """Change nothing: all weights are trained."""
    return {}
