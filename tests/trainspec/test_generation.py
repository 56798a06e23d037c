"""The loop of generation with a backend of tables: where responses end, what is shown of them, how many programs it takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trainspec.files.hf import end_tokens
from trainspec.generation import loop
from trainspec.generation.choice import TokenScore
from trainspec.generation.generation import Generation, read_generations
from trainspec.generation.request import GenerationRequest, Settings
from trainspec.generation.responder import Responder
from trainspec.generation.rows import batch_of
from trainspec.runs.processes import Processes
from trainspec.runs.run import resolve

BOS, EOS = 1, 2


class Table:
    """A backend that answers each prompt with the next of `tokens`; it notes the shapes that it is given."""

    def __init__(self, tokens: list[int], vocab: int) -> None:
        self.tokens, self.vocab, self.shapes, self.starts = tokens, vocab, set(), {}

    def init_state(self, run, *, like=None):
        return None

    def decoding(self, state, *, length):
        return None

    def next_logits(self, state, batch, last):
        self.shapes.add(batch.input_ids.shape)
        logits = np.zeros((len(last), self.vocab))
        for i, end in enumerate(last):
            start = self.starts.setdefault(i, end)
            logits[i, self.tokens[max(0, min(end - start, len(self.tokens) - 1))]] = 1.0
        return logits


@pytest.fixture
def generated(make_recipe, tmp_path: Path, capsys):
    """The first generation, what was printed, and the backend."""
    run = resolve(make_recipe())

    def generate(tokens: list[int], *prompts: str, **asked):
        backend = Table(tokens, run.spec.vocab)
        request = GenerationRequest(
            tmp_path, prompts, None, Settings(**{"max_tokens": 50} | asked), untrained=True
        )
        made = loop.generate(backend, run, request, Processes())
        return made, capsys.readouterr().out, backend, run

    return generate


def test_an_end_token_ends_a_response_at_the_last_position_too(generated):
    made, _, _, run = generated([EOS], "Why?")
    assert (made[0].finish, made[0].ids, made[0].text) == ("stop", (EOS,), "")
    room = run.spec.max_positions - len(made[0].prompt_ids)
    [full] = generated([7] * (room - 1) + [EOS], "Why?", max_tokens=9999)[0]
    assert (full.finish, len(full.ids)) == ("stop", room)
    [cut] = generated([7] * 999, "Why?", max_tokens=9999)[0]
    assert (cut.finish, len(cut.ids)) == ("length", room)


def test_a_stop_text_is_neither_kept_nor_shown(generated):
    """ "H", "E", "L", "L" one token each: the beginning of a stop text is not shown until it is clear that it is none."""
    letters = [3 + "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(c) for c in "HELLO"]
    made, out, _, _ = generated([*letters, EOS], "Why?")
    assert made[0].text == "HELLO"
    made, out, _, _ = generated([*letters, EOS], "Why?", stop=("LO",))
    assert (made[0].text, made[0].finish) == ("HEL", "stop")
    assert "\nHEL\nwrote" in out
    assert "HELL" not in out
    made, out, _, _ = generated([*letters, EOS], "Why?", stop=("LLX",))
    assert "\nHELLO\nwrote" in out


def test_a_batch_keeps_its_shape_while_its_rows_end(generated, tmp_path: Path):
    made, _, backend, _ = generated([7, 8, EOS], "a", "b c d e", "f", batch=2)
    assert [g.prompt for g in made] == ["a", "b c d e", "f"]
    assert backend.shapes == {(2, 64)}
    written = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert [tuple(w["ids"]) for w in written] == [g.ids for g in made]


def test_what_is_done_stays_when_the_rest_is_interrupted(generated, tmp_path: Path, monkeypatch):
    calls, respond = [], Responder._batch

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return respond(*arguments)

    monkeypatch.setattr(Responder, "_batch", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        generated([7, EOS], "a", "b", batch=1)
    assert stopped.value.__notes__ == [f"{tmp_path / 'generations.jsonl'} has the first 1 of 2 responses"]
    assert len((tmp_path / "generations.jsonl").read_text().splitlines()) == 1


def test_rows_are_padded_to_the_room_that_there_is():
    batch, last = batch_of([[1, 2, 3], []], limit=10, count=3)
    assert batch.input_ids.shape == (3, 10)
    assert last.tolist() == [2, 0, 0]
    assert batch.segments.sum(1).tolist() == [3, 1, 1]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085", "\x0c", "\r\n", "\n", ""])
def test_a_generation_is_read_as_it_was_written_whatever_its_text_has_in_it(end: str, tmp_path: Path):
    """Characters that are the end of a line to some, too."""
    scores = (TokenScore(-0.5, 3, 0.25), TokenScore(-1.0, 4, -0.125))
    made = [
        Generation(f"a{end}b", (1, 5), (6, EOS), f"c{end}", "stop", f"{end}d"),
        Generation("e", (1,), (7, 8), end, "length", scores=scores),
    ]
    path = tmp_path / "generations.jsonl"
    path.write_text("".join(f"{each.line()}\n" for each in made), encoding="utf-8")
    assert read_generations(path) == made


def test_a_special_token_stops_where_it_is_named(generated):
    """It is in no response's text, so that as a text it would never be found."""
    [going] = generated([7, BOS, 8, EOS], "Why?")[0]
    assert going.ids == (7, BOS, 8, EOS)
    [stopped] = generated([7, BOS, 8, EOS], "Why?", stop=("<s>",))[0]
    assert (stopped.ids, stopped.finish, stopped.text) == ((7, BOS), "stop", going.text[:1])


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, set()),
        ({"config.json": 3}, {3}),
        ({"config.json": [3, 4]}, {3, 4}),
        ({"config.json": None}, set()),
        ({"config.json": 3, "generation_config.json": [5, 6]}, {5, 6}),
        ({"config.json": 3, "generation_config.json": None}, {3}),
    ],
)
def test_a_model_s_files_say_where_responses_end(tmp_path: Path, files: dict, ends: set[int]):
    for name, end in files.items():
        (tmp_path / name).write_text(json.dumps({"eos_token_id": end}))
    assert end_tokens(tmp_path) == ends


def test_an_end_token_of_the_model_s_files_ends_a_response(generated, model_dirs, tmp_path: Path):
    (config := model_dirs["plain"] / "generation_config.json").write_text('{"eos_token_id": [9]}')
    try:
        [stopped] = generated([7, 9, 8, EOS], "Why?")[0]
    finally:
        config.unlink()
    assert (stopped.ids, stopped.finish) == ((7, 9), "stop")
