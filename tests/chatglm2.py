"""A tiny ChatGLM2 as published, from the facts alone: its forward pass in numpy, and its tokens by sentencepiece.

Sources: the model's config.json and weights; GLM-130B, arXiv 2210.02414 (rotation of half a head, in pairs of neighbours);
multi-query attention, arXiv 1911.02150; SwiGLU, arXiv 2002.05202. Nothing of ours is imported.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from safetensors.numpy import save_file

# Sizes are small and odd; the other settings are those of the published file.
CONFIG = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 37,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 20,
    "kv_channels": 12,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 3,
    "original_rope": True,
    "padded_vocab_size": 331,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 2048,
    "use_cache": True,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS, GROUPS, WIDTH = (
    CONFIG[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels")
)


def published_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under the published names, biases and norms too, in float64."""
    draw, embed, inner, vocab = np.random.default_rng(seed), 20, 37, 331
    rows = (HEADS + 2 * GROUPS) * WIDTH
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocab, embed)}
    for i in range(3):
        shapes |= {
            f"transformer.encoder.layers.{i}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (embed,),
                "self_attention.query_key_value.weight": (rows, embed),
                "self_attention.query_key_value.bias": (rows,),
                "self_attention.dense.weight": (embed, HEADS * WIDTH),
                "post_attention_layernorm.weight": (embed,),
                "mlp.dense_h_to_4h.weight": (2 * inner, embed),
                "mlp.dense_4h_to_h.weight": (embed, inner),
            }.items()
        }
    shapes["transformer.encoder.final_layernorm.weight"] = (embed,)
    shapes["transformer.output_layer.weight"] = (vocab, embed)
    return {name: ("norm" in name) + 0.15 * draw.standard_normal(shape) for name, shape in shapes.items()}


def write_published(directory: Path, *, dtype: str = "float32", shards: int = 1) -> dict[str, np.ndarray]:
    """A directory in the published layout; its weights, with the frequencies that the published files have, too."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = published_weights()
    weights["transformer.rotary_pos_emb.inv_freq"] = 10000.0 ** (-np.arange(0, WIDTH // 2, 2) / (WIDTH // 2))
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    (directory / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": dtype}))
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return weights
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = dict(list(weights.items())[shard::shards])
        save_file(held, directory / file)
        where |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


SENTENCES = (
    "[Round 1]", "问：北京在哪里？", "答：在中国北方。", "今天天气很好，我们去公园散步。", "你好，世界！", "我在学习中文和英文。",
    "What is the capital of France? It is Paris.", "Name a fruit. A pear, or an apple.", "sop eop gMASK MASK", "def f(x):  return x + 1",
)  # fmt: skip


def write_sentencepiece(
    directory: Path, *, byte_fallback: bool = True
) -> sentencepiece.SentencePieceProcessor:
    """Its tokenizer files, with a small vocabulary of both languages; the numbers of the special tokens follow the pieces."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=made, model_type="bpe", vocab_size=420, byte_fallback=byte_fallback,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0, split_digits=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(made.getvalue())
    config = {
        "name_or_path": "x/chatglm2-6b", "remove_space": False, "do_lower_case": False, "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())


def training_ids(
    pieces: sentencepiece.SentencePieceProcessor,
    question: str,
    answer: str,
    history: Sequence[tuple[str, str]] = (),
) -> tuple[list[int], list[int]]:
    """Ids and labels of one record: rounds of the history, the question in front of the answer, labels -100 on padding's id."""
    prompt = "".join(f"[Round {i}]\n\n问：{q}\n\n答：{a}\n\n" for i, (q, a) in enumerate(history, 1))
    prompt += f"[Round {len(history) + 1}]\n\n问：{question}\n\n答："
    # After the pieces: [MASK], [gMASK], [sMASK], sop, eop.
    first = [pieces.vocab_size() + 1, pieces.vocab_size() + 3, *pieces.encode(prompt)]
    second = [*pieces.encode(answer), pieces.eos_id()]
    labels = [-100] * len(first) + [-100 if i == pieces.unk_id() else i for i in second]
    return first + second, labels


def prefix_of(weights: dict[str, np.ndarray]) -> np.ndarray:
    """What its prefix encoder makes, [pre_seq_len, 2 layers, groups, width]: of each layer the keys, then the values."""
    encoder = "transformer.prefix_encoder"
    made = weights[f"{encoder}.embedding.weight"]
    if f"{encoder}.trans.0.weight" in weights:
        made = np.tanh(made @ weights[f"{encoder}.trans.0.weight"].T + weights[f"{encoder}.trans.0.bias"])
        made = made @ weights[f"{encoder}.trans.2.weight"].T + weights[f"{encoder}.trans.2.bias"]
    return made.reshape(len(made), 2 * CONFIG["num_layers"], GROUPS, WIDTH)


def logits(weights: dict[str, np.ndarray], ids: list[int], prefix: np.ndarray | None = None) -> np.ndarray:
    """[tokens, vocab], in float64, token by token. The tokens after a `prefix` start at position 0, and all see all of it."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for i in range(3):
        layer = f"transformer.encoder.layers.{i}"
        fused = norm(x, w[f"{layer}.input_layernorm.weight"])
        fused = fused @ w[f"{layer}.self_attention.query_key_value.weight"].T
        fused = fused + w[f"{layer}.self_attention.query_key_value.bias"]
        front = (None, None) if prefix is None else (prefix[:, 2 * i], prefix[:, 2 * i + 1])
        x = x + attention(fused, *front) @ w[f"{layer}.self_attention.dense.weight"].T
        both = (
            norm(x, w[f"{layer}.post_attention_layernorm.weight"]) @ w[f"{layer}.mlp.dense_h_to_4h.weight"].T
        )
        first, second = both[:, :37], both[:, 37:]
        x = x + (first / (1 + np.exp(-first)) * second) @ w[f"{layer}.mlp.dense_4h_to_h.weight"].T
    return norm(x, w["transformer.encoder.final_layernorm.weight"]) @ w["transformer.output_layer.weight"].T


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG["layernorm_epsilon"])


def attention(
    fused: np.ndarray, front_keys: np.ndarray | None = None, front_values: np.ndarray | None = None
) -> np.ndarray:
    """All query heads, then the groups' keys, then their values; each group serves HEADS / GROUPS queries in turn.

    What stands in front, [n, groups, width], is not turned.
    """
    heads = [fused[:, at : at + WIDTH] for at in range(0, fused.shape[1], WIDTH)]
    queries, keys, values = heads[:HEADS], heads[HEADS : HEADS + GROUPS], heads[HEADS + GROUPS :]
    keys, n = [turned(key) for key in keys], 0
    if front_keys is not None:
        n = len(front_keys)
        keys = [np.concatenate([front_keys[:, g], key]) for g, key in enumerate(keys)]
        values = [np.concatenate([front_values[:, g], value]) for g, value in enumerate(values)]
    mixed = np.zeros((len(fused), HEADS * WIDTH))
    for head, query in enumerate(queries):
        group = head // (HEADS // GROUPS)
        for at, row in enumerate(turned(query)):
            scores = keys[group][: n + at + 1] @ row / math.sqrt(WIDTH)
            shares = np.exp(scores - scores.max())
            mixed[at, head * WIDTH : (head + 1) * WIDTH] = shares / shares.sum() @ values[group][: n + at + 1]
    return mixed


def turned(x: np.ndarray) -> np.ndarray:
    """The first half of a head in pairs of neighbours, each a complex number; the rest stays."""
    half, result = WIDTH // 2, x.copy()
    pairs = x[:, 0:half:2] + 1j * x[:, 1:half:2]
    angles = np.outer(np.arange(len(x)), 10000.0 ** (-np.arange(0, half, 2) / half))
    pairs = pairs * np.exp(1j * angles)
    result[:, 0:half:2], result[:, 1:half:2] = pairs.real, pairs.imag
    return result
