"""Loss and gradient belong to the documents of a batch, not to how they lie in it."""

import numpy as np
import pytest
from backend import start_state, train_step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import SMALL, recipe_maker, write_checkpoint
from test_model import FP64, LORA

from trainspec.data import IGNORED, Batch

ROWS, TOKENS = 8, 48
ROUNDING = 1e-12  # sums of a few hundred terms in another order, each to 1e-16


@pytest.fixture
def run(tmp_path):
    """(gradients, loss, tokens) of a batch split into microbatches, from the same starting weights: no update moves them."""
    make = recipe_maker({"plain": write_checkpoint(tmp_path / "plain", SMALL)})
    states = {}

    def started(method: str, accumulation: int):
        return start_state(
            make(
                method=LORA | {"dropout": 0.0} if method == "lora" else {"kind": method},
                precision=FP64,
                batch={"global_examples": ROWS, "accumulation": accumulation},
            )
        )

    def once(method: str, batch: Batch, accumulation: int):
        key = (method, accumulation)
        state = states.pop(key) if key in states else started(*key)
        states[key], metrics = train_step(state, batch, lr=0.0, keep="gradients")
        return metrics.gradients, metrics.loss_sum, metrics.tokens

    return once


Document = tuple[list[int], int]  # tokens, and how many of them are prompt
documents = st.lists(
    st.tuples(st.lists(st.integers(3, SMALL.vocab - 1), min_size=3, max_size=20), st.integers(1, 2)),
    min_size=3,
    max_size=ROWS,
)


def laid_out(rows: list[list[Document]], *, left: bool) -> Batch:
    """The documents of each row one behind the other; rows that are left over are padding."""
    arrays = {name: np.zeros((ROWS, TOKENS), np.int32) for name in ("input_ids", "positions", "segments")}
    labels = np.full((ROWS, TOKENS), IGNORED, np.int32)
    for i, row in enumerate(rows):
        at = TOKENS - sum(len(tokens) for tokens, _ in row) if left else 0
        for number, (tokens, prompt) in enumerate(row, 1):
            here = slice(at, at + len(tokens))
            arrays["input_ids"][i, here], arrays["segments"][i, here] = tokens, number
            arrays["positions"][i, here] = np.arange(len(tokens))
            labels[i, at + prompt : at + len(tokens)] = tokens[prompt:]
            at += len(tokens)
    return Batch(labels=labels, rows=np.arange(ROWS, dtype=np.int32), **arrays)


def packed(pieces: list[Document]) -> list[list[Document]]:
    rows: list[list[Document]] = [[]]
    for piece in pieces:
        if sum(len(tokens) for tokens, _ in rows[-1]) + len(piece[0]) > TOKENS:
            rows.append([])
        rows[-1].append(piece)
    return rows


def furthest(mine, theirs) -> float:
    return np.max([np.abs(mine[n] - theirs[n]).max() / max(np.abs(theirs[n]).max(), 1e-30) for n in theirs])


# All examples share the compiled programs.
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=documents, data=st.data())
def test_padding_packing_order_and_split_do_not_matter(run, pieces, data):
    method = data.draw(st.sampled_from(["full", "lora"]))
    gradients, loss, tokens = run(method, laid_out([[piece] for piece in pieces], left=False), 1)
    shuffled = data.draw(st.permutations(pieces))
    rows = packed(shuffled) if data.draw(st.booleans()) else [[piece] for piece in shuffled]
    batch = laid_out(rows, left=data.draw(st.booleans()))
    others, other_loss, other_tokens = run(method, batch, data.draw(st.sampled_from([1, 2, 4, 8])))
    assert other_tokens == tokens == sum(len(t) - prompt for t, prompt in pieces)
    assert other_loss == pytest.approx(loss, rel=ROUNDING)
    # B is zero at the start, so LoRA's A has no gradient yet.
    assert furthest(others, gradients) <= ROUNDING


def test_a_layout_that_does_matter_is_noticed(run):
    """Negative control: documents that see each other, and positions that go on, move the gradient."""
    pieces = [(list(range(5, 20)), 1), (list(range(40, 60)), 1)]
    batch = laid_out([pieces], left=False)
    gradients, _, _ = run("full", batch, 1)
    joined = Batch(batch.input_ids, batch.labels, batch.positions, np.minimum(batch.segments, 1), batch.rows)
    going_on = batch.positions.copy()
    going_on[0, 15:35] = np.arange(15, 35) * 2
    moved = Batch(batch.input_ids, batch.labels, going_on, batch.segments, batch.rows)
    for wrong in (joined, moved):
        assert furthest(run("full", wrong, 1)[0], gradients) > 1e-6
