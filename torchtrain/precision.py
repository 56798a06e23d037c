"""The types of a run's numbers: of weights, of sums, of matrix products, and of arrays that leave torch."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainspec.plans.plan import COMPUTE_DTYPE, Policy


def use_exact_matmul() -> None:
    """No TF32: fp32 means fp32, in an LSTM of cuDNN's too."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def compute_dtype(policy: Policy) -> torch.dtype:
    """The type of weights and activations."""
    return getattr(torch, COMPUTE_DTYPE[policy])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums of `dtype` are made: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The same numbers on the host; numpy's bfloat16 is that of ml_dtypes."""
    host = tensor.detach().cpu()
    if host.dtype == torch.bfloat16:
        return host.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.numpy()
