"""The real tokenizers of families through the oracle, with templates of these families' styles.

Mistral's come with a package of the development environment (`tokenizers.py`). Qwen's vocabulary, which Qwen2, 2.5 and 3 share, and
Llama 3's, which SmolLM3 has as well, are fetched by `make vocabularies`. No package ships GLM's; ChatGLM2's is a SentencePiece
model, of which `tokenizers.py` has others.
"""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path

import pytest
from small import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from oracle.conversations import CONVERSATIONS
from oracle.family_templates import FAMILY_TAGGED
from oracle.judge import Judge
from oracle.templates import TAGGED
from oracle.test_oracle_matrix import _compare, clock_and_cache  # noqa: F401 (a fixture of every test here)
from oracle.tokenizers import LLAMA3_SPLIT, _around, _letters_of_bytes, _merged_from, _split, make_tokenizers

VOCABULARIES = ROOT / "build/vocabularies"
# GPT-4's pattern, but that each digit stands alone: dashscope's tokenizer has it.
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# The added tokens by id, those of Qwen2.5 and 3 and those of SmolLM3; the ids in between are of no use here.
QWEN_ADDED = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
LLAMA3_ADDED = {
    "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<think>": 128002, "</think>": 128003,
    "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eot_id|>": 128009, "<|im_start|>": 128011,
    "<|im_end|>": 128012,
}  # fmt: skip
SHOWN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Of each directory the templates of its families.
STYLES = {
    "qwen": ("qwen2.5", "qwen3", "chatml"),
    "llama3": ("llama3", "smollm3"),
    "mistral_v3": ("mistral", "smollm3"),
    "tekken": ("mistral", "qwen2.5"),
}
FETCHED = ("qwen", "llama3")


def ranks_of(file: Path) -> dict[bytes, int]:
    lines = file.read_bytes().split(b"\n")
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def from_ranks(file: Path, pattern: str, added: dict[str, int]) -> Tokenizer:
    """A tiktoken file as a byte-level BPE."""
    ranks, letters = ranks_of(file), _letters_of_bytes()
    spelt = {token: "".join(letters[b] for b in token) for token in ranks}
    # Some of Llama 3's tokens are no merge of two: only a whole stretch of text becomes one, which `ignore_merges` looks up.
    halves = (_merged_from(token, ranks) for token in ranks if len(token) > 1)
    merges = [(spelt[a], spelt[b]) for a, b in halves if a in ranks and b in ranks]
    vocab = {spelt[token]: rank for token, rank in ranks.items()}
    # Unused ids keep those of the tokens after them.
    names = {i: token for token, i in added.items()}
    fillers = [names.get(i, f"<|unused_{i}|>") for i in range(len(ranks), max(names) + 1)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _split(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=t not in SHOWN, normalized=False) for t in fillers if t not in SHOWN]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in SHOWN])
    return tokenizer


_shipped = cache(make_tokenizers)


@cache
def directory_of(name: str, root: Path) -> Path:
    if name not in FETCHED:
        return _shipped(root / "shipped")[name]
    file = VOCABULARIES / f"{name}.tiktoken"
    if not file.is_file():
        pytest.skip(f"{file.relative_to(ROOT)}: `make vocabularies` fetches it")
    if name == "qwen":
        tokenizer = from_ranks(file, QWEN_SPLIT, QWEN_ADDED)
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    else:
        tokenizer = from_ranks(file, LLAMA3_SPLIT, LLAMA3_ADDED)
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=True), _around("<|begin_of_text|> $A", tokenizer)]
        )
        config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    directory = root / name
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "tekken" else pytest.mark.full) for n in STYLES]
)
def test_ids_and_mask_are_those_of_transformers(name: str, root: Path):
    templates = {style: (TAGGED | FAMILY_TAGGED)[style] for style in STYLES[name]}
    outcome = _compare(directory_of(name, root), CONVERSATIONS, templates)
    assert not outcome.wrong, f"{len(outcome.wrong)} of {outcome.rendered}, the first: {outcome.wrong[0]}"
    assert not outcome.unlocated
    assert outcome.rendered >= 13 * len(templates)


@pytest.mark.full
@pytest.mark.parametrize("name", FETCHED)
def test_a_fetched_vocabulary_gives_its_own_ranks(name: str, root: Path):
    """What is one token of the file is that token's rank, wherever the pattern leaves it whole."""
    tokenizer = Judge(directory_of(name, root)).tokenizer
    ranks = ranks_of(VOCABULARIES / f"{name}.tiktoken")
    words = ["Hello", " world", " transformer", "ing", " 北京", "北京", "\n\n", "  ", "'s", " déjà"]
    whole = [word for word in words if word.encode() in ranks]
    assert len(whole) >= 7
    for word in whole:
        assert tokenizer(word, add_special_tokens=False).input_ids == [ranks[word.encode()]], word
    numbers = tokenizer("2024", add_special_tokens=False).input_ids
    assert len(numbers) == (4 if name == "qwen" else 2)  # digits one by one, or by three


@pytest.mark.full
def test_a_template_of_another_family_has_other_ids(root: Path):
    """Control: the oracle tells the styles apart."""
    transformers = Judge(directory_of("tekken", root))
    record = CONVERSATIONS["many_turns"]
    one, other = (
        transformers.verdict(FAMILY_TAGGED[style], record["messages"], None) for style in FAMILY_TAGGED
    )
    assert one.ids != other.ids
