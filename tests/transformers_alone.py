"""Loss and gradients of chats by transformers alone: its tokenizer, its template, its mask, its model. Nothing of ours.

    python tests/transformers_alone.py CHATS.jsonl OUT DIRECTORY ...     writes OUT/NAME-exact.npz and OUT/NAME-as-is.npz

`as-is` is transformers as it comes, in float64; `exact` has the two modules that it computes in float32 even then, the norm
and the rotary tables, in float64.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3


def exact_norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def exact_rotary(self, x, position_ids):
    angle = position_ids[..., None].double() * self.exact
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def inverse_frequencies(config):
    """transformers' own function of the rope's type, with its float32 arange and theta in float64."""
    rope, size = config.rope_parameters, config.head_dim
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
    return plain


def loss_and_gradients(directory, records, *, exact):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="sdpa")
    if exact:
        modeling_llama.LlamaRMSNorm.forward = exact_norm
        modeling_llama.LlamaRotaryEmbedding.forward = exact_rotary
        modeling_qwen3.Qwen3RMSNorm.forward = exact_norm
        modeling_qwen3.Qwen3RotaryEmbedding.forward = exact_rotary
        model.model.rotary_emb.exact = inverse_frequencies(model.config)
    total, tokens = 0.0, 0
    for record in records:
        said = tokenizer.apply_chat_template(
            record["messages"], tools=record.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor([said["input_ids"]]), torch.tensor(said["assistant_masks"]).bool()
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits[mask[1:]], ids[0, 1:][mask[1:]], reduction="sum"
        )
        tokens += int(mask[1:].sum())
    loss = total / tokens
    loss.backward()
    gradients = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    return {"loss": loss.detach().numpy(), "tokens": np.array(tokens), **gradients}


if __name__ == "__main__":
    chats, out, *directories = map(Path, sys.argv[1:])
    records = [json.loads(line) for line in chats.read_text(encoding="utf-8").splitlines()]
    for name, exact in (("as-is", False), ("exact", True)):
        for directory in directories:
            found = loss_and_gradients(directory, records, exact=exact)
            np.savez(out / f"{directory.name}-{name}.npz", **found)
