"""What `--allow` may name. Light: a command line is parsed before anything heavy is imported."""

from __future__ import annotations

# The groups of `--allow`: settings that may change on request.
ALLOWABLE: dict[str, tuple[str, ...]] = {
    "data": ("data.sequence_tokens", "data.packing", "data.padding_side", "data.loss_on", "data.too_long"),
    "schedule": (
        "schedule.kind",
        "schedule.warmup_steps",
        "schedule.warmup_ratio",
        "schedule.final_ratio",
        "optimizer.lr",
    ),
}
