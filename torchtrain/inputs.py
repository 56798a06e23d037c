"""What a forward pass takes of a batch: its arrays on the device, with the positions of virtual tokens, and what each token sees."""

# B examples, S sequence, T positions of a layer (`methods.virtual_tokens`)

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from torchtrain.attention.visible import Visible, rows_of
from torchtrain.engines.engine import Inputs
from torchtrain.mesh import compute_device
from torchtrain.methods import all_positions, all_segments
from trainspec.data import Batch
from trainspec.methods import leading_positions, position_shift, virtual_tokens
from trainspec.runs.run import Run


def inputs_of(batch: Batch, run: Run, *, is_recorded: bool = False) -> Inputs:
    """Those of these examples."""
    method, shift = run.recipe.method, position_shift(run.recipe.method)
    positions_BT = all_positions(on_device(batch.positions), method)
    leading = leading_positions(method)
    visible = Visible(
        segments_BT=all_segments(on_device(batch.segments), method),
        positions_BT=positions_BT,
        rows=rows_of(batch.segments, batch.positions, shift=shift),
        prompt=leading,
        prefix=virtual_tokens(method) - leading,
        window=run.spec.window,
        prefix_has_positions=shift > 0,
        is_recorded=is_recorded,
    )
    return {"input_ids": on_device(batch.input_ids), "position_ids": positions_BT, "visible": visible}


def on_device(array: NDArray[Any]) -> Tensor:
    """On the device. A GPU copies from pinned memory: the host waits neither for the copy nor for what was asked before."""
    host, device = torch.from_numpy(array), compute_device()
    if device.type == "cuda" and not host.is_pinned():
        host = host.pin_memory()
    return host.to(device, non_blocking=True).to(torch.int64)
