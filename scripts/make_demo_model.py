"""Make a small real model: a checkpoint and tokenizer in Hugging Face's format, trained on the demo text.

    python scripts/make_demo_model.py OUT [--tied] [--bias] [--rope llama3] [--layers N] [--hidden N] [--steps N]
    python scripts/make_demo_model.py OUT --family qwen3 [--layers N] [--hidden N] [--steps N]

The sizes are chosen to show mistakes that round ones hide: a head is not hidden/heads wide, key/value heads are
fewer than query heads, the query matrix is not square, and the weights lie in several shards. It is trained for a
few steps, so that fine-tuning starts from a model that has learnt something. Of another family than Llama it has what
that family does otherwise. An OUT that was made with the same arguments is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

TEXT = Path(__file__).parent.parent / "configs/data/text-train.txt"
STAMP = "made-with.json"
VOCABULARY = 1024
PAD, BEGIN, END = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # their ids are 0, 1, 2
ROW_TOKENS, BATCH_ROWS = 128, 4
# What the published models of each family have otherwise than a Llama. The window is shorter than a row.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {"rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    "qwen3": {"rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    "mistral": {"sliding_window": ROW_TOKENS // 2},
    "smollm3": {"rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    "glm": {"rms_norm_eps": 1.5625e-7},
}
# A turn is "Role:", its text, and the end token where the model is to stop.
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ message['role'].capitalize() }}:
{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}

{% endfor %}{% if add_generation_prompt %}Assistant:
{% endif %}"""


def main() -> None:
    """Read the arguments and write OUT, unless it is there already."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="by transformers' model_type")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 16")
    parser.add_argument(
        "--tied", action="store_true", help="one matrix for the embedding and the head (Llama)"
    )
    parser.add_argument("--bias", action="store_true", help="biases in the attention and the MLP (Llama)")
    parser.add_argument("--rope", choices=("default", "llama3"), default="default")
    parser.add_argument("--steps", type=int, default=200, help="training steps; 0 leaves the weights random")
    arguments = parser.parse_args()
    if arguments.family != "llama" and (arguments.tied or arguments.bias or arguments.rope != "default"):
        parser.error(f"--tied, --bias and --rope are a Llama's; a {arguments.family} has its own")
    out: Path = arguments.out
    stamp = {key: value for key, value in vars(arguments).items() if key != "out"}
    stamp |= {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (TEXT, Path(__file__))}
    if out.exists() and not (out / STAMP).is_file():
        parser.error(f"{out} exists and was not made by this script; remove it or choose another OUT")
    if out.exists() and json.loads((out / STAMP).read_text()) == stamp:
        print(f"{out}: already there")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}-") as scratch:
        new = Path(scratch) / "model"
        write_model(new, arguments)
        (new / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(new, out)


def write_model(directory: Path, arguments: argparse.Namespace) -> None:
    """Train the tokenizer and the model and save both into `directory`."""
    # Saving imports DeepSpeed where it is installed, which warns of a missing GPU unless told that none is meant.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # sums depend on the number of threads: one gives the same weights everywhere
    documents = TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    tokenizer = train_tokenizer(documents)
    if arguments.family == "llama":
        config = llama_config(
            hidden=arguments.hidden,
            layers=arguments.layers,
            tied=arguments.tied,
            bias=arguments.bias,
            rope=arguments.rope,
        )
    else:
        sizes = model_sizes(hidden=arguments.hidden, layers=arguments.layers)
        config = AutoConfig.for_model(arguments.family, **(sizes | FAMILIES[arguments.family]))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rows = token_rows(tokenizer, documents)
    losses = train(model, rows, steps=arguments.steps)
    learnt = (
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps" if losses else "random weights"
    )
    print(
        f"{arguments.out}: {model.num_parameters() / 1e6:.2f} M parameters, {rows.numel()} tokens, {learnt}"
    )
    model.save_pretrained(directory, max_shard_size="1MB")
    tokenizer.save_pretrained(directory)


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that, like Llama's, puts <s> in front unless told not to."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )


def llama_config(*, hidden: int, layers: int, tied: bool, bias: bool, rope: str) -> PreTrainedConfig:
    """The demo model's configuration."""
    rope_parameters: dict[str, str | float | int] = {"rope_type": rope, "rope_theta": 10000.0}
    if rope == "llama3":
        rope_parameters |= {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    rules = {
        "rope_parameters": rope_parameters,
        "tie_word_embeddings": tied,
        "attention_bias": bias,
        "mlp_bias": bias,
    }
    return AutoConfig.for_model("llama", **(model_sizes(hidden=hidden, layers=layers) | rules))


def model_sizes(*, hidden: int, layers: int) -> dict[str, object]:
    """The sizes of a model; `hidden` 128 gives 8 query heads, 2 key/value heads of width 32, MLP 352."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
        "initializer_range": 0.08,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def token_rows(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one stream, <s> and </s> around each, cut into rows: int64 [rows, ROW_TOKENS]."""
    stream = [token for text in documents for token in tokenizer.encode(text + END)]
    return torch.tensor(stream[: len(stream) // ROW_TOKENS * ROW_TOKENS]).view(-1, ROW_TOKENS)


def train(model: PreTrainedModel, rows: torch.Tensor, *, steps: int) -> list[float]:
    """Plain next-token training with AdamW; the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps))
    losses = []
    model.train()
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH_ROWS,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()
