"""What the Trainer and the plain loop share: a tiny Llama, its data and settings."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, TOKENS, IGNORED = 31, 12, -100
STEPS, SLICES, EXAMPLES = 4, 2, 2  # examples of one accumulation slice
LR, WARMUP, CLIP, DECAY = 1e-2, 1, 0.5, 0.1


def model() -> LlamaForCausalLM:
    """With the same random weights each time, in float64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=TOKENS, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """A slice's part of the mean over all target tokens of an update; transformers' own converts to float32 first."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss_sum = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return loss_sum / num_items_in_batch


def examples() -> list[dict[str, list[int]]]:
    """All examples in the order of training; the loss is on the answer, whose length varies."""
    draw = np.random.default_rng(6)
    listed = []
    for _ in range(STEPS * SLICES * EXAMPLES):
        ids = draw.integers(0, VOCAB, TOKENS)
        prompt = np.arange(TOKENS) < draw.integers(1, TOKENS - 1)
        listed.append({"input_ids": ids.tolist(), "labels": np.where(prompt, IGNORED, ids).tolist()})
    return listed
