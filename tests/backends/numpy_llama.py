"""An independent Llama in float64 numpy, and the families that change it: one document at a time, no mask, no packing, no batch.

Written from the papers, not from the code under test: RMSNorm (arXiv 1910.07467), RoPE as a complex rotation
(2104.09864), grouped queries (2305.13245), SwiGLU (2002.05202), LoRA merged into its matrix (2106.09685), DoRA (2402.09353), bottleneck
adapters (1902.00751), rows in front of the embedded tokens (2104.08691), keys and values in front of a layer's (2101.00190); Qwen3's norms of heads (2505.09388), Mistral's window (2310.06825), layers
without rotation (2501.18795), GLM's pairs of neighbours (2406.12793), YaRN (2309.00071).
"""

import math

import numpy as np

from trainspec.data import IGNORED, Batch
from trainspec.methods import PEFT_PREFIX
from trainspec.model import ModelSpec
from trainspec.rope import LinearScaling, Llama3Scaling, YarnScaling

GLM = ("glm", "chatglm2")


def documents(batch: Batch):
    """(example, slice) of every document of every row."""
    for example, segments in enumerate(batch.segments):
        for number in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == number)
            yield example, slice(places[0], places[-1] + 1)


def loss_sum(weights, spec: ModelSpec, batch: Batch, **method) -> float:
    """Sum of the cross-entropies of every label that is not ignored; `method` as in `document_logits`."""
    total = 0.0
    for example, where in documents(batch):
        logits = document_logits(weights, spec, batch.input_ids[example, where], **method)
        for place, label in enumerate(batch.labels[example, where]):
            if label != IGNORED:
                before = logits[place - 1]
                total += before.max() + math.log(np.exp(before - before.max()).sum()) - before[label]
    return total


def document_logits(
    weights,
    spec: ModelSpec,
    ids,
    *,
    lora_scale: float = 0.0,
    held=None,
    act=None,
    rows=None,
    prefix=None,
    from_zero=False,
):
    """Logits [len(ids), vocab] of one document.

    Adapters are those in `weights`, with `act` in the middle; DoRA's norms are those of the weights `held`. `rows` [n, embed] stand in front of the embedded tokens,
    `prefix` [n, 2 layers, kv_heads, head_dim] has a layer's keys and, one further, its values; the tokens after it are at
    positions n and on, or `from_zero`.
    """

    def linear(x, module):
        matrix = weights[f"{module}.weight"]
        adapter = f"{PEFT_PREFIX}{module}"
        if f"{adapter}.lora_A.weight" in weights:
            matrix = with_product(weights, module)
        if (m := weights.get(f"{adapter}.lora_magnitude_vector.weight")) is not None:
            matrix = np.diag(m / np.sqrt((with_product(held, module) ** 2).sum(axis=1))) @ matrix
        return x @ matrix.T + weights.get(f"{module}.bias", 0.0)

    def with_product(weights, module):
        a, b = (weights[f"{PEFT_PREFIX}{module}.lora_{x}.weight"] for x in "AB")
        return weights[f"{module}.weight"] + lora_scale * b @ a

    def norm(x, module):
        size = np.sqrt((x**2).sum(axis=-1, keepdims=True) / spec.embed + spec.norm_eps)
        return x / size * weights[f"{module}.weight"]

    def head_norm(x, module):
        """Qwen3's: every head by itself."""
        d, heads = spec.head_dim, []
        for at in range(0, x.shape[1], d):
            size = np.sqrt((x[:, at : at + d] ** 2).sum(axis=-1, keepdims=True) / d + spec.norm_eps)
            heads.append(x[:, at : at + d] / size * weights[f"{module}.weight"])
        return np.concatenate(heads, axis=1)

    def adapted(x, module):
        if f"{module}.down.weight" not in weights:
            return x
        return x + linear(act(linear(x, f"{module}.down")), f"{module}.up")

    x = weights["model.embed_tokens.weight"][ids]
    if rows is not None:
        x = np.concatenate([rows, x])
    for i in range(spec.layers):
        layer = f"model.layers.{i}"
        inner = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(inner, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        if spec.family == "qwen3":
            q, k = (head_norm(x, f"{layer}.self_attn.{name}_norm") for x, name in ((q, "q"), (k, "k")))
        before = () if prefix is None else (prefix[:, 2 * i], prefix[:, 2 * i + 1])
        mixed = attention(q, k, v, spec, before, turns=i not in spec.unrotated, from_zero=from_zero)
        x = x + adapted(linear(mixed, f"{layer}.self_attn.o_proj"), f"{layer}.attention_adapter")
        inner = norm(x, f"{layer}.post_attention_layernorm")
        if spec.family in GLM:
            both = linear(inner, f"{layer}.mlp.gate_up_proj")
            gate, up = both[:, : spec.mlp], both[:, spec.mlp :]
        else:
            gate, up = linear(inner, f"{layer}.mlp.gate_proj"), linear(inner, f"{layer}.mlp.up_proj")
        inner = linear(gate / (1 + np.exp(-gate)) * up, f"{layer}.mlp.down_proj")
        x = x + adapted(inner, f"{layer}.mlp_adapter")
    x = norm(x[-len(ids) :], "model.norm")
    return x @ weights["model.embed_tokens.weight"].T if spec.tied_embeddings else linear(x, "lm_head")


def attention(q, k, v, spec: ModelSpec, prefix=(), *, turns: bool, from_zero: bool = False):
    """Causal attention, head by head and query by query; q, k and v are [tokens, heads * head_dim].

    The keys and values of a `prefix` are [n, kv_heads, head_dim]: not rotated, and seen by all that are in the window, or
    by all where the tokens start at position 0. `turns` says whether the layer rotates.
    """
    mixed = np.zeros_like(q)
    d = spec.head_dim
    for head in range(spec.heads):
        kv_head = head * spec.kv_heads // spec.heads
        mine, shared = slice(head * d, (head + 1) * d), slice(kv_head * d, (kv_head + 1) * d)
        n = len(prefix[0]) if prefix else 0
        queries, keys, values = q[:, mine], k[:, shared], v[:, shared]
        if turns:
            first = 0 if from_zero else n
            queries, keys = rotated(queries, spec, first), rotated(keys, spec, first)
        if prefix:
            keys, values = (
                np.concatenate([f[:, kv_head], own]) for f, own in zip(prefix, (keys, values), strict=True)
            )
        for query in range(len(q)):
            end = n + query + 1
            start = 0 if spec.window is None else max(0, end - spec.window)
            seen = [*range(n), *range(max(n, start), end)] if from_zero else slice(start, end)
            scores = keys[seen] @ queries[query] / math.sqrt(d)
            shares = np.exp(scores - scores.max())
            mixed[query, mine] = shares / shares.sum() @ values[seen]
    return mixed


def rotated(x, spec: ModelSpec, first: int = 0):
    """RoPE on one head [tokens, head_dim]: dimensions j and j + head_dim / 2 are one complex number; GLM's are 2j and 2j + 1.

    `first` is the position of the first token.
    """
    half = int(spec.head_dim * spec.rotary_share) // 2
    angles = np.outer(first + np.arange(len(x)), [frequency(j, spec) for j in range(half)])
    scaling, result = spec.rope_scaling, x.copy()
    stretch = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
    real, imaginary = slice(0, half), slice(half, 2 * half)
    if spec.family in GLM:
        real, imaginary = (slice(start, 2 * half, 2) for start in (0, 1))
    turned = (x[:, real] + 1j * x[:, imaginary]) * np.exp(1j * angles) * stretch
    result[:, real], result[:, imaginary] = turned.real, turned.imag
    return result


def frequency(j: int, spec: ModelSpec) -> float:
    """The angle per position of pair j, with Llama 3's or YaRN's stretch or divided positions where the spec has them."""
    width = int(spec.head_dim * spec.rotary_share)
    plain = spec.rope_theta ** (-2 * j / width)
    scaling = spec.rope_scaling
    if isinstance(scaling, YarnScaling):
        # The pair, as a real number, that makes so many turns over the original context.
        fast, slow = (
            width / 2 * math.log(scaling.original_positions / (2 * math.pi * turns), spec.rope_theta)
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        fast, slow = max(math.floor(fast), 0), min(math.ceil(slow), width - 1)
        share = min(max((j - fast) / (slow - fast), 0), 1)
        return share * plain / scaling.factor + (1 - share) * plain
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if not isinstance(scaling, Llama3Scaling):
        return plain
    turns = scaling.original_positions * plain / (2 * math.pi)
    if turns < scaling.low_freq_factor:
        return plain / scaling.factor
    if turns > scaling.high_freq_factor:
        return plain
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return share * plain + (1 - share) * plain / scaling.factor
