"""The language models of docs/examples with a mistake planted: writes HOME/lm-CASE for each case of argv, all of one side.

python tests/parity/twins/planted_lm.py HOME torch|jax CASE...
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3] / "docs/examples"))


def torch_cases() -> dict[str, tuple[Any, str, Callable]]:
    """By case what is replaced: of which module, the name, by what."""
    import torch
    from torch.nn import functional

    embedding, attention = functional.embedding, functional.scaled_dot_product_attention
    cross_entropy = functional.cross_entropy

    def masked(outside: float, inside: float) -> Callable:
        """Attention with a mask that is added to the scores."""

        def attend(q, k, v, *, is_causal):
            seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
            return attention(q, k, v, attn_mask=torch.where(seen, inside, outside).to(q.dtype))

        return attend

    return {
        "torch": (functional, "embedding", embedding),
        "padding_idx": (functional, "embedding", lambda ids, weight, *_: embedding(ids, weight, 0)),
        "label_smoothing": (
            functional, "cross_entropy", lambda *args, **named: cross_entropy(*args, **named, label_smoothing=0.1),
        ),
        "float_mask": (functional, "scaled_dot_product_attention", masked(0.0, 1.0)),
        "mask_value": (functional, "scaled_dot_product_attention", masked(-1e9, 0.0)),
    }  # fmt: skip


def jax_cases() -> dict[str, tuple[Any, str, Callable]]:
    """By case what is replaced."""
    import jax
    import twin_lm_jax

    attention = jax.nn.dot_product_attention
    return {
        "jax": (twin_lm_jax, "attend", twin_lm_jax.attend),
        "softmax32": (twin_lm_jax, "attend", lambda q, k, v: attention(q, k, v, is_causal=True)),
    }


def main() -> None:
    """Run the cases, each in turn and alone."""
    home, side, *cases = sys.argv[1:]
    known = {"torch": torch_cases, "jax": jax_cases}[side]()
    program = __import__(f"twin_lm_{side}")
    for case in cases:
        module, name, planted = known[case]
        kept = getattr(module, name)
        setattr(module, name, planted)
        sys.argv[1:] = [f"{home}/lm-{case}"]
        program.main()
        setattr(module, name, kept)


if __name__ == "__main__":
    main()
