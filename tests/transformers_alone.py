"""Loss and gradients of chats by transformers alone: its tokenizer, its template, its mask, its model. Nothing of ours.

    python tests/transformers_alone.py CHATS.jsonl OUT DIRECTORY ...     writes OUT/NAME-KIND.npz for every kind

`fp32` is transformers as it comes, `as-is` the same in float64; `exact` has the two modules that it computes in float32 even then, the norm
and the rotary tables, in float64.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.smollm3 import modeling_smollm3

MODULES = {
    "Glm": modeling_glm,
    "Llama": modeling_llama,
    "Mistral": modeling_mistral,
    "Qwen2": modeling_qwen2,
    "Qwen3": modeling_qwen3,
    "SmolLM3": modeling_smollm3,
}


def exact_norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def exact_rotary(self, x, position_ids):
    angle = position_ids[..., None].double() * self.exact
    angle = torch.cat([angle, angle], -1)
    return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def inverse_frequencies(config):
    """transformers' own function of the rope's type, with its float32 arange and theta in float64."""
    rope = config.rope_parameters
    size = int(config.head_dim * rope.get("partial_rotary_factor", 1))
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    match rope["rope_type"]:
        case "linear":
            return plain / rope["factor"]
        case "llama3":
            turns = rope["original_max_position_embeddings"] * plain / (2 * torch.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            share = ((turns - low) / (high - low)).clamp(0, 1)
            mixed = (1 - share) * plain / rope["factor"] + share * plain
            assert torch.allclose(mixed.float(), ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0], rtol=1e-5)
            return mixed
        case "yarn":
            # The pairs that turn 32 times and once over the original context; between them the stretch grows.
            context, theta = rope["original_max_position_embeddings"], rope["rope_theta"]
            pairs = [size / 2 * math.log(context / (2 * math.pi * n)) / math.log(theta) for n in (32, 1)]
            fast, slow = max(math.floor(pairs[0]), 0), min(math.ceil(pairs[1]), size - 1)
            share = ((torch.arange(size // 2, dtype=torch.float64) - fast) / (slow - fast)).clamp(0, 1)
            mixed = share * plain / rope["factor"] + (1 - share) * plain
            assert torch.allclose(mixed.float(), ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[0], rtol=1e-5)
            return mixed
    return plain


def loss_and_gradients(directory, records, *, dtype, exact):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
    if exact:
        for name, module in MODULES.items():
            getattr(module, f"{name}RMSNorm").forward = exact_norm
            getattr(module, f"{name}RotaryEmbedding").forward = exact_rotary
        model.model.rotary_emb.exact = inverse_frequencies(model.config)
    total, tokens, longest = 0.0, 0, 0
    for record in records:
        said = tokenizer.apply_chat_template(
            record["messages"], tools=record.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor([said["input_ids"]]), torch.tensor(said["assistant_masks"]).bool()
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits[mask[1:]], ids[0, 1:][mask[1:]], reduction="sum"
        )
        tokens, longest = tokens + int(mask[1:].sum()), max(longest, len(mask))
    loss = total / tokens
    loss.backward()
    gradients = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    about = {"loss": loss.detach().numpy(), "tokens": np.array(tokens), "longest": np.array(longest)}
    return about | gradients


if __name__ == "__main__":
    chats, out, *directories = map(Path, sys.argv[1:])
    records = [json.loads(line) for line in chats.read_text(encoding="utf-8").splitlines()]
    kinds = {"fp32": (torch.float32, False), "as-is": (torch.float64, False), "exact": (torch.float64, True)}
    for name, (dtype, exact) in kinds.items():
        for directory in directories:
            found = loss_and_gradients(directory, records, dtype=dtype, exact=exact)
            np.savez(out / f"{directory.name}-{name}.npz", **found)
