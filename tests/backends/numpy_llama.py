"""An independent Llama in float64 numpy: one document at a time, no mask, no packing, no batch.

Written from the papers, not from the code under test: RMSNorm (arXiv 1910.07467), RoPE as a complex rotation
(2104.09864), grouped queries (2305.13245), SwiGLU (2002.05202), LoRA merged into its matrix (2106.09685).
"""

import math

import numpy as np

from trainspec.data import IGNORED, Batch
from trainspec.methods import PEFT_PREFIX
from trainspec.model import ModelSpec


def documents(batch: Batch):
    """(example, slice) of every document of every row."""
    for example, segments in enumerate(batch.segments):
        for number in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == number)
            yield example, slice(places[0], places[-1] + 1)


def loss_sum(weights, spec: ModelSpec, batch: Batch, *, lora_scale: float = 0.0) -> float:
    """Sum of the cross-entropies of every label that is not ignored."""
    total = 0.0
    for example, where in documents(batch):
        logits = document_logits(weights, spec, batch.input_ids[example, where], lora_scale=lora_scale)
        for place, label in enumerate(batch.labels[example, where]):
            if label != IGNORED:
                before = logits[place - 1]
                total += before.max() + math.log(np.exp(before - before.max()).sum()) - before[label]
    return total


def document_logits(weights, spec: ModelSpec, ids, *, lora_scale: float = 0.0):
    """Logits [len(ids), vocab] of one document."""

    def linear(x, module):
        matrix = weights[f"{module}.weight"]
        adapter = f"{PEFT_PREFIX}{module}"
        if f"{adapter}.lora_A.weight" in weights:
            product = weights[f"{adapter}.lora_B.weight"] @ weights[f"{adapter}.lora_A.weight"]
            matrix = matrix + lora_scale * product
        return x @ matrix.T + weights.get(f"{module}.bias", 0.0)

    def norm(x, module):
        size = np.sqrt((x**2).sum(axis=-1, keepdims=True) / spec.embed + spec.norm_eps)
        return x / size * weights[f"{module}.weight"]

    x = weights["model.embed_tokens.weight"][ids]
    for i in range(spec.layers):
        layer = f"model.layers.{i}"
        inner = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(inner, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        x = x + linear(attention(q, k, v, spec), f"{layer}.self_attn.o_proj")
        inner = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(inner, f"{layer}.mlp.gate_proj")
        gate = gate / (1 + np.exp(-gate))
        x = x + linear(gate * linear(inner, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    x = norm(x, "model.norm")
    return x @ weights["model.embed_tokens.weight"].T if spec.tied_embeddings else linear(x, "lm_head")


def attention(q, k, v, spec: ModelSpec):
    """Causal attention, head by head and query by query; q, k and v are [tokens, heads * head_dim]."""
    mixed = np.zeros_like(q)
    d = spec.head_dim
    for head in range(spec.heads):
        kv_head = head * spec.kv_heads // spec.heads
        mine, shared = slice(head * d, (head + 1) * d), slice(kv_head * d, (kv_head + 1) * d)
        rotated_q, rotated_k = rotated(q[:, mine], spec), rotated(k[:, shared], spec)
        for query in range(len(q)):
            scores = rotated_k[: query + 1] @ rotated_q[query] / math.sqrt(d)
            shares = np.exp(scores - scores.max())
            mixed[query, mine] = shares / shares.sum() @ v[: query + 1, shared]
    return mixed


def rotated(x, spec: ModelSpec):
    """RoPE on one head [tokens, head_dim]: dimensions j and j + head_dim / 2 are one complex number."""
    half = spec.head_dim // 2
    angles = np.outer(np.arange(len(x)), [frequency(j, spec) for j in range(half)])
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=1)


def frequency(j: int, spec: ModelSpec) -> float:
    """The angle per position of pair j, with Llama 3's stretch where the spec has one."""
    plain = spec.rope_theta ** (-2 * j / spec.head_dim)
    scaling = spec.rope_scaling
    if scaling is None:
        return plain
    turns = scaling.original_positions * plain / (2 * math.pi)
    if turns < scaling.low_freq_factor:
        return plain / scaling.factor
    if turns > scaling.high_freq_factor:
        return plain
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return share * plain + (1 - share) * plain / scaling.factor
