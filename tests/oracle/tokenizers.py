"""Tokenizer directories as models on the hub have them: small ones trained here, and Mistral's own.

`make_tokenizers` writes them. What is special about each is said where it is made. Most know the templates' tokens
as added tokens; `PLAIN` names those for which most of them are plain text.

Mistral's tekken file is cut to its first ranks, which is a vocabulary by itself, and written as a tokenizer.json:
transformers 5.23 reads tekken.json with mistral-common 1.11.5 and newer only, and these want numpy < 2.4.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import mistral_common
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = Path(__file__).parents[2] / "configs/data/text-train.txt"
MISTRAL = Path(mistral_common.__file__).parent / "data"

NAMED = ["<pad>", "<s>", "</s>", "<unk>"]
# What the templates write that is one token for the models which have it.
MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
    "[gMASK]",
    "sop",
    "<sop>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<|end|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
    "<|call|>",
]
# Added tokens, but no special ones: decoding shows them.
SHOWN = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
PLAIN = {"plain_bytes", "plain_prepend", "wordpiece_plain", "mistral_v1", "mistral_v3"}

FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
BOS_EOS = {"bos_token": "<s>", "eos_token": "</s>"}
# The published patterns of GPT-4 and Llama 3, which split digits by three and keep line ends behind punctuation.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizers(root: Path) -> dict[str, Path]:
    """All tokenizer directories, by name, made under `root`."""
    made: dict[str, Path] = {}

    def write(name: str, tokenizer: Tokenizer | None, **files: dict[str, Any] | Path) -> None:
        directory = made[name] = root / name
        directory.mkdir(parents=True)
        if tokenizer is not None:
            tokenizer.save(str(directory / "tokenizer.json"))
        for stem, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, directory / "tokenizer.model")
            else:
                (directory / f"{stem}.json").write_text(
                    json.dumps(content, ensure_ascii=False), encoding="utf-8"
                )

    config = FAST | BOS_EOS | {"pad_token": "<pad>"}
    _byte_level(write, config)
    _sentencepiece_style(write, config)
    _where_tokens_stand(write, config)
    _begin_and_end(write, config)
    _real(write, config)
    return made


def _byte_level(write: Any, config: dict[str, Any]) -> None:
    # GPT-2's way, with a begin token from the post-processor.
    bos = _bytes_bpe()
    bos.post_processor = _around("<s> $A", bos)
    write("bytes_bos", bos, tokenizer_config=config)
    # Qwen's way: no begin token at all, an end token that is a mark, and NFC.
    nobos = _bytes_bpe()
    nobos.normalizer = normalizers.NFC()
    nobos.post_processor = processors.ByteLevel(trim_offsets=False)
    write("bytes_nobos", nobos, tokenizer_config=FAST | {"eos_token": "<|im_end|>", "pad_token": "<pad>"})
    # Llama 3's way: a pattern of its own, and offsets that leave the blank before a word out.
    llama3 = _bytes_bpe()
    llama3.pre_tokenizer = _split(LLAMA3_SPLIT)
    llama3.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _around("<|begin_of_text|> $A", llama3)]
    )
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    write("bytes_llama3", llama3, tokenizer_config=FAST | special)
    # The templates' marks are plain text, whose ends can melt into what stands beside them.
    write("plain_bytes", _bytes_bpe(marks=False), tokenizer_config=config)


def _sentencepiece_style(write: Any, config: dict[str, Any]) -> None:
    # Llama 2's tokenizer.json: a blank is put in front of every stretch between added tokens.
    prepend = _metaspace_bpe(pre_tokenizer=None)
    prepend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    prepend.post_processor = _around("<s> $A", prepend)
    write("prepend", prepend, tokenizer_config=config | {"legacy": True})
    plain = _metaspace_bpe(pre_tokenizer=None, marks=False)
    plain.normalizer = prepend.normalizer
    plain.post_processor = prepend.post_processor
    write("plain_prepend", plain, tokenizer_config=config)
    # Blanks at the text's start only; words are not split; and at the start of every stretch.
    first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    write("metaspace_first", _metaspace_bpe(first), tokenizer_config=config)
    always = pre_tokenizers.Metaspace(prepend_scheme="always")
    write("metaspace_always", _metaspace_bpe(always), tokenizer_config=config)
    # T5's way: NFKC, so characters of the text and of the tokens differ in number, and an end token behind.
    unigram = _added(_trained_unigram())
    unigram.post_processor = _around("$A </s>", unigram)
    write("unigram", unigram, tokenizer_config=config)
    # BERT's way: blank space and unknown characters leave no trace in the tokens.
    for name, marks in (("wordpiece", True), ("wordpiece_plain", False)):
        wordpiece = _added(_trained_wordpiece(), marks=marks)
        wordpiece.post_processor = _around("<s> $A </s>", wordpiece)
        write(name, wordpiece, tokenizer_config=config | {"unk_token": "<unk>"})


def _where_tokens_stand(write: Any, config: dict[str, Any]) -> None:
    # In tokenizer.json only; no file names the begin and end tokens.
    write("in_tokenizer_json", _bytes_bpe(), tokenizer_config=FAST)
    bare = _copy(_trained_bytes_bpe())
    first = bare.get_vocab_size()
    ids = {token: first + i for i, token in enumerate([*NAMED, *MARKS, *SHOWN])}
    # In tokenizer_config.json only, with the ids behind the vocabulary.
    decoder = {str(i): _as_dict(token, special=token not in SHOWN) for token, i in ids.items()}
    write("in_config", bare, tokenizer_config=config | {"added_tokens_decoder": decoder})
    # In added_tokens.json only, as slow tokenizers wrote it; special_tokens_map.json says which are special.
    special = {**BOS_EOS, "pad_token": "<pad>", "additional_special_tokens": MARKS}
    write("in_added_tokens", bare, tokenizer_config=FAST, added_tokens=ids, special_tokens_map=special)
    # No tokenizer_config.json: only special_tokens_map.json names begin and end.
    write("in_special_map", _bytes_bpe(), special_tokens_map=dict(BOS_EOS))
    # Marks that take the blank space beside them: Phi-3's rstrip, and an lstrip.
    strip = _copy(_trained_bytes_bpe())
    strip.add_special_tokens([AddedToken(t, special=True) for t in NAMED])
    takes = {"<|assistant|>": "r", "<|im_end|>": "r", "[/INST]": "l", "<|eot_id|>": "lr", "<|user|>": "r"}
    for token in MARKS:
        sides = takes.get(token, "")
        strip.add_special_tokens([AddedToken(token, special=True, lstrip="l" in sides, rstrip="r" in sides)])
    strip.add_tokens([AddedToken(t, normalized=False) for t in SHOWN])
    write("strip", strip, tokenizer_config=config)


def _begin_and_end(write: Any, config: dict[str, Any]) -> None:
    # With a tokenizer.json transformers takes the post-processor's word and not these settings'.
    flags = {"add_bos_token": False, "add_eos_token": True}
    write("flags_fast", _bytes_bpe(), tokenizer_config=config | flags)
    # A tokenizer.json that would cut and fill every text, which transformers switches off for each call.
    cutting = _bytes_bpe()
    cutting.enable_truncation(16)
    cutting.enable_padding(pad_token="<pad>", length=512)
    write("cutting", cutting, tokenizer_config=config | {"model_max_length": 16})
    # LlamaTokenizer builds the tokenizer anew from a tokenizer.json's vocabulary and merges, with Metaspace.
    llama = _metaspace_bpe(pre_tokenizer=None)
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.post_processor = _around("<s> $A", llama)
    config = BOS_EOS | {"tokenizer_class": "LlamaTokenizerFast"}
    write("flags_llama", llama, tokenizer_config=config | flags)


def _real(write: Any, config: dict[str, Any]) -> None:
    # SentencePiece models as they are: the first without marks, the third with those of its templates.
    llama = BOS_EOS | {"tokenizer_class": "LlamaTokenizer"}
    flags = {"add_bos_token": False, "add_eos_token": True}
    write("mistral_v1", None, tokenizer_config=llama | flags, model=MISTRAL / "tokenizer.model.v1")
    v3 = MISTRAL / "mistral_instruct_tokenizer_240323.model.v3"
    write("mistral_v3", None, tokenizer_config=llama | {"legacy": False}, model=v3)
    tekken = _added(_tekken(num_ranks=8000))
    tekken.post_processor = _around("<s> $A", tekken)
    write("tekken", tekken, tokenizer_config=config)


# ---------------------------------------------------------------- the tokenizers, each trained once


def _lines() -> list[str]:
    # The first part is enough for a few hundred merges.
    return TEXT.read_text(encoding="utf-8")[:60_000].splitlines(keepends=True)


@lru_cache
def _trained_bytes_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _lines(), trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


@lru_cache
def _trained_metaspace_bpe() -> Tokenizer:
    # Bytes for what is not in the vocabulary, as SentencePiece's byte_fallback.
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # As in SentencePiece's own vocabularies, bytes come behind the named ones and are no added tokens.
    pieces = [*NAMED, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=750, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(_lines(), trainer)
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if token["content"] in NAMED]
    return Tokenizer.from_str(json.dumps(written))


@lru_cache
def _trained_unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=NAMED, unk_token="<unk>", show_progress=False, n_sub_iterations=1
    )
    tokenizer.train_from_iterator(_lines()[:400], trainer)
    return tokenizer


@lru_cache
def _trained_wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=NAMED, show_progress=False)
    tokenizer.train_from_iterator(_lines(), trainer)
    return tokenizer


def _tekken(num_ranks: int) -> Tokenizer:
    file = json.loads((MISTRAL / "tekken_240718.json").read_text(encoding="utf-8"))
    ranks = {base64.b64decode(v["token_bytes"]): v["rank"] for v in file["vocab"][:num_ranks]}
    letters = _letters_of_bytes()
    spelt = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = [
        (spelt[a], spelt[b]) for token in ranks if len(token) > 1 for a, b in [_merged_from(token, ranks)]
    ]
    vocab = {token: i for i, token in enumerate(NAMED)} | {
        spelt[token]: len(NAMED) + rank for token, rank in ranks.items()
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _split(file["config"]["pattern"])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merged_from(token: bytes, ranks: dict[bytes, int]) -> Sequence[bytes]:
    """The two tokens that a token was merged from: merge by rank, with the ranks before its own."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, ranks[token]) for a, b in pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _letters_of_bytes() -> dict[int, str]:
    """GPT-2's letter for every byte: its own where it prints, else one from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printed]
    return {b: chr(b) for b in printed} | {b: chr(256 + i) for i, b in enumerate(others)}


# ---------------------------------------------------------------- variants of them


def _bytes_bpe(*, marks: bool = True) -> Tokenizer:
    return _added(_trained_bytes_bpe(), marks=marks)


def _metaspace_bpe(pre_tokenizer: pre_tokenizers.PreTokenizer | None, *, marks: bool = True) -> Tokenizer:
    tokenizer = _added(_trained_metaspace_bpe(), marks=marks)
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def _added(trained: Tokenizer, *, marks: bool = True) -> Tokenizer:
    tokenizer = _copy(trained)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _some(marks)])
    if marks:
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in SHOWN])
    return tokenizer


def _some(marks: bool) -> Iterator[str]:
    yield from NAMED
    if marks:
        yield from MARKS


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str())


def _around(template: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    special: Iterable[str] = (part for part in template.split() if part != "$A")
    return processors.TemplateProcessing(
        single=template, special_tokens=[(token, tokenizer.token_to_id(token)) for token in special]
    )


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _as_dict(token: str, *, special: bool) -> dict[str, Any]:
    return {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False} | {
        "special": special
    }
