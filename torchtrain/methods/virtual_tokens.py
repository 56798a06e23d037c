"""What methods with virtual tokens share: a batch's arrays with them, and embeddings before those of the tokens.

With leading embeddings every layer has T = N + S positions. Virtual tokens have positions 0 to N - 1, real ones start
at N, and every query sees all virtual tokens before it, whatever its segment: a packed example gives what its segments give
one by one.
"""

# B examples, S sequence, N virtual tokens, T positions of a layer, E embed

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchtrain.activations import tap
from torchtrain.families import anatomy_of
from torchtrain.layers import VIRTUAL
from trainspec.data import IGNORED
from trainspec.methods import ENCODER, Method, leading_positions, position_shift


def all_positions(positions_BS: Tensor, method: Method) -> Tensor:
    """Positions [B, T] in a layer, from those of the tokens in their segments."""
    moved_BS = positions_BS + position_shift(method)
    leading_N = torch.arange(leading_positions(method), device=positions_BS.device)
    return torch.cat((leading_N.expand(len(moved_BS), -1), moved_BS), 1)


def all_labels(labels_BS: Tensor, method: Method) -> Tensor:
    """Labels [B, T]: a virtual token is never a target."""
    return F.pad(labels_BS, (leading_positions(method), 0), value=IGNORED)


def all_segments(segments_BS: Tensor, method: Method) -> Tensor:
    """Segments [B, T]: virtual tokens have one of their own, which all others see."""
    return F.pad(segments_BS, (leading_positions(method), 0), value=VIRTUAL)


def put_in_front(model: PreTrainedModel, encoder: nn.Module, count: int) -> None:
    """Put the output of `encoder` for `count` virtual tokens before that of the embedding, in passes that begin rows."""
    model.add_module(ENCODER, encoder)
    tokens_1N = torch.arange(count)[None]
    wanted = count

    # A pipeline calls its layers without it, and begins rows in every pass.
    def look(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        nonlocal wanted
        wanted = kwargs["visible"].prompt

    # A hook, as the embedding may be the head as well.
    def prepend(_: nn.Module, __: Any, embedded_BSE: Tensor) -> Tensor:
        if not wanted:
            return embedded_BSE
        virtual_1NE = encoder(tokens_1N.to(embedded_BSE.device))
        virtual_BNE = tap("prompt", virtual_1NE.expand(len(embedded_BSE), -1, -1))
        return torch.cat((virtual_BNE, embedded_BSE), 1)

    anatomy = anatomy_of(model)
    anatomy.inner(model).register_forward_pre_hook(look, with_kwargs=True)
    anatomy.embedding(model).register_forward_hook(prepend)
