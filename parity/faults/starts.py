"""Faults of the starting weights: rows in another order, biases left out, a layer read twice, a folded scale."""

from __future__ import annotations

from parity.faults.fault import Fault, Where, in_every_backend
from parity.runs.edit import Edit

STARTS = "parity.faults.substitutes.starts"


def starting(change: str) -> dict:
    """The model's weights as a function of the substitutes changes them on their way in."""
    return in_every_backend(
        Edit(
            "trainspec.init:base_weights",
            "return read_model(__directory, __spec, __table, dtype=__dtype)",
            f"from {STARTS} import {change}\nreturn {change}(read_model(__directory, __spec, __table, dtype=__dtype), __spec)",
        )
    )


FAULTS = (
    Fault(
        name="query-rows-permuted",
        imitates="the rows of queries and keys are in the order of Meta's checkpoints, for pairs side by side",
        source="meta-pytorch/gpt-fast#190, huggingface/transformers#31788, jzhang38/TinyLlama#24",
        cause="weight-layout",
        where=Where("initial", r"model\.layers\.0\.self_attn\.q_proj\.weight", 0),
        edits=starting("with_pairs_side_by_side"),
    ),
    Fault(
        name="biases-not-loaded",
        imitates="the checkpoint's biases of queries, keys and values are not read and stay zero",
        source="sbryngelson/ANEForge#253 (Qwen2's were dropped)",
        cause="weight-not-loaded",
        where=Where("initial", r"model\.layers\.0\.self_attn\.q_proj\.bias", 0),
        edits=starting("without_qkv_biases"),
        setup="bias",
    ),
    Fault(
        name="layer-loaded-twice",
        imitates="the second layer has the first one's weights: an index that counts within a rank or is one off",
        source="tenstorrent/tt-metal#54884",
        cause="layer-order",
        where=Where("initial", r"model\.layers\.1\.input_layernorm\.weight", 0),
        edits=starting("with_the_first_layer_twice"),
    ),
    Fault(
        name="query-weight-scaled",
        imitates="a conversion has folded attention's scale into the weight of the queries",
        source="NeuraLegion/shainet#176 (where the query's scale is); fairseq scales q, not the scores",
        cause="weight-scaled",
        where=Where("initial", r"model\.layers\.0\.self_attn\.q_proj\.weight", 0),
        edits=starting("with_scaled_queries"),
    ),
)
