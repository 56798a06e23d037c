"""Records that are no conversations: the ids are those of `tokenizer(text)`, begin tokens and all, with one end token behind."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from oracle.tokenizers import make_tokenizers
from trainspec.text.encode import Encoder

TEXTS = [
    (("Question: Why?\nAnswer:\n", False), ("Because.", True)),
    (("Question: é 日本 👩‍🚀\nAnswer:\n", False), ("    if x:\n        return 1\n", True)),
    (("", False), ("All of it. ", True)),
    (("Say nothing:", False), ("", True)),
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def test_ids_are_those_of_the_tokenizer_and_an_end_token(directories: dict[str, Path]):
    bos_seen = set()
    for name, directory in directories.items():
        encoder, tokenizer = Encoder(directory), AutoTokenizer.from_pretrained(directory)
        for stretches in TEXTS:
            text = "".join(stretch for stretch, _ in stretches)
            wanted = tokenizer(text)["input_ids"]
            if tokenizer.eos_token_id is not None and wanted[-1:] != [tokenizer.eos_token_id]:
                wanted = [*wanted, tokenizer.eos_token_id]
            encoded = encoder.encode_text(stretches)
            assert encoded.ids == wanted, (name, text)
            bos_seen.add((name, encoded.ids[0] == tokenizer.bos_token_id))
            learnt = [i for i, counts in zip(encoded.ids, encoded.counts, strict=True) if counts]
            if stretches[-1][0]:
                ends = learnt[-1] == tokenizer.eos_token_id
                assert ends or tokenizer.eos_token_id is None, (name, text)
                answer = tokenizer.decode(learnt[:-1] if ends else learnt).strip()
                assert answer.endswith(stretches[-1][0].strip()[-4:]), (name, text)
            else:
                assert not learnt
    # The control: some tokenizers put a begin token in front, and some do not.
    assert {True, False} == {seen for _, seen in bos_seen}


def test_what_was_rendered_before_gets_no_second_begin_or_end_token(directories: dict[str, Path]):
    for name in ("bytes_bos", "prepend"):
        encoder = Encoder(directories[name])
        assert encoder.bos is not None
        once = encoder.encode_text([("Hello", True)])
        again = encoder.encode_text([("<s>Hello</s>", True)])
        assert again.ids.count(encoder.bos) == once.ids.count(encoder.bos) == 1, name
        assert again.ids.count(encoder.eos) == 1, name
