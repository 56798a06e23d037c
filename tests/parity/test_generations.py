"""Two sides' responses: what rounding explains passes, the same difference with less rounding fails, and the location is named."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from parity.comparison.choices import FixedMovement, MeasuredMovement, reach
from parity.comparison.generations import (
    BOTH,
    GenerationComparison,
    Pair,
    compare_generations,
    rows_of,
)
from parity.comparison.rescored import Row
from parity.report.generations import CloserLook, GenerationVerdict
from parity.runs.rescore import rescored
from trainspec.generation.choice import Sampling, choose, penalised, score
from trainspec.generation.generation import Generation
from trainspec.plans.names import Policy

V, PROMPT, STOP = 40, (1, 2, 3), 2
SIGMA = 1e-5
DRAWN = Sampling(temperature=0.8)
FILTERED = Sampling(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.2)
GREEDY = Sampling()
Logits = NDArray[np.float64]


def table(seed: int = 0, *, tokens: int = 12) -> Logits:
    """Logits [tokens, V] after a prompt and each of its tokens: one side's are these, moved by its roundings."""
    return np.random.default_rng(seed).normal(scale=2.0, size=(tokens, V))


def moved(logits_TV: Logits, seed: int, sigma: float = SIGMA) -> Logits:
    return logits_TV + np.random.default_rng(seed).normal(scale=sigma, size=logits_TV.shape)


def generation(logits_TV: Logits, sampling: Sampling = GREEDY, *, number: int = 0) -> Generation:
    """What a side generates whose logits these are; they depend on the position alone."""
    ids: list[int] = []
    for logits_V in logits_TV:
        seen = [*PROMPT, *ids]
        ids.append(choose(logits_V, sampling, seen=seen, prompt=number, position=len(seen)))
    scores = tuple(score(logits_V, token) for logits_V, token in zip(logits_TV, ids, strict=True))
    return Generation("a prompt", PROMPT, tuple(ids), " ".join(map(str, ids)), "length", scores=scores)


def compared(
    pairs: Sequence[Pair],
    truth: Sequence[Logits],
    *,
    precision: Policy = "fp32",
    sampling: Sampling = GREEDY,
    sigma: float = SIGMA,
) -> GenerationComparison:
    """With a reference whose logits are `truth`, and four draws that move them by `sigma`."""
    found = []
    for row, logits_TV in zip(rows_of(pairs), truth, strict=True):
        longer = np.concatenate([logits_TV, np.zeros((1, V))])[: len(row.agreed) + 1]
        draws = [] if precision == "fp64" else [moved(longer, 100 + n, sigma) for n in range(4)]
        found.append(rescored(row, longer, draws))
    return compare_generations(pairs, found, precision=precision, sampling=sampling)


def nudged(logits_TV: Logits, position: int, token: int, by: float) -> Logits:
    changed = logits_TV.copy()
    changed[position, token] += by
    return changed


def tied(position: int, margin: float, *, ways: int = 2) -> tuple[Logits, list[int]]:
    """Logits whose best tokens at a position are `margin` apart, the best of them first."""
    truth = table()
    order = [int(i) for i in np.argsort(truth[position])[::-1][:ways]]
    truth[position, order] = truth[position, order[0]] - margin * np.arange(ways)
    return truth, order


def test_sides_that_round_differently_agree():
    truth = [table(seed) for seed in range(6)]
    pairs = [(generation(moved(t, 1)), generation(moved(t, 2))) for t in truth]
    comparison = compared(pairs, truth)
    assert comparison.holds
    assert comparison.first_difference is None
    assert comparison.compared == 6 * 12
    assert 0.01 < comparison.worst.used < 0.9
    # Control: the same sides, had rounding been a hundredth of what it is.
    assert not compared(pairs, truth, sigma=SIGMA / 100).holds


@pytest.mark.parametrize("side", [0, 1])
def test_a_log_probability_that_is_off_is_found_where_it_is_though_the_tokens_agree(side: int):
    truth = [table(seed) for seed in range(3)]
    pairs = [[generation(moved(t, 1)), generation(moved(t, 2))] for t in truth]
    best = int(truth[1][7].argmax())
    pairs[1][side] = generation(nudged(moved(truth[1], 1 + side), 7, best, 1e-2))
    comparison = compared([(left, right) for left, right in pairs], truth)
    first = comparison.first_difference
    assert first
    assert (first.prompt, first.position, first.sides) == (1, 7, (("left", "right")[side],))
    assert not comparison.partings
    assert comparison.first_tokens_agree


def test_a_first_token_that_differs_is_no_mistake_of_decoding():
    truth = table()
    best = int(truth[0].argmax())
    pair = (generation(truth), generation(nudged(truth, 0, best, 1e-2)))
    assert not compared([pair], [truth]).first_tokens_agree


def test_a_log_probability_that_is_no_number_fails():
    truth = table()
    side = generation(truth)
    assert side.scores
    broken = replace(side, scores=(replace(side.scores[0], log_prob=math.nan), *side.scores[1:]))
    comparison = compared([(side, broken)], [truth])
    assert comparison.departing == ("right",)
    without = compared([(side, replace(side, scores=None))], [truth])
    assert without.departing == ("right",)
    assert compared([(side, side)], [truth]).holds  # control


@pytest.mark.parametrize("ways", [2, 3])
def test_a_near_tie_explains_a_parting_and_a_wider_one_does_not(ways: int):
    near, order = tied(5, SIGMA, ways=ways)
    other = nudged(near, 5, order[-1], 2 * ways * SIGMA)
    comparison = compared([(generation(near), generation(other))], [near])
    [parting] = comparison.partings
    assert comparison.holds
    assert (parting.position, [c.token for c in parting.next_tokens]) == (5, [order[0], order[-1]])
    assert comparison.left_out == 2 * (12 - 5)
    assert comparison.compared == 5
    # The same margin, and less rounding.
    assert not compared([(generation(near), generation(other))], [near], sigma=SIGMA / 1000).holds
    wide, order = tied(5, 100 * SIGMA, ways=ways)
    other = nudged(wide, 5, order[-1], 200 * ways * SIGMA)
    comparison = compared([(generation(wide), generation(other))], [wide])
    first = comparison.first_difference
    assert first
    assert (first.position, first.sides) == (5, ("right",))


def test_in_fp64_the_bound_is_fixed_and_the_sides_are_compared_with_each_other():
    truth = table()
    same = (generation(truth), generation(moved(truth, 1, 1e-14)))
    assert compared([same], [truth], precision="fp64").holds
    best = int(truth[3].argmax())
    off = generation(nudged(truth, 3, best, 1e-6))
    assert compared([(off, generation(truth))], [truth], precision="fp64").departing == ("left",)
    # Each within its bound of the reference, and too far from each other.
    share = float(truth[3].max() - score(truth[3], best).log_prob > 0) and 1 - math.exp(
        score(truth[3], best).log_prob
    )
    step = 0.8e-9 * float(np.abs(truth[3]).max()) / share
    pair = (generation(nudged(truth, 3, best, step)), generation(nudged(truth, 3, best, -step)))
    comparison = compared([pair], [truth], precision="fp64")
    assert [gap.side for r in comparison.responses for gap in r.gaps if not gap.holds] == [BOTH]
    near, order = tied(5, 1e-12)
    other = nudged(near, 5, order[1], 2e-12)
    assert compared([(generation(near), generation(other))], [near], precision="fp64").holds
    near, order = tied(5, 1e-6)
    other = nudged(near, 5, order[1], 2e-6)
    assert not compared([(generation(near), generation(other))], [near], precision="fp64").holds


def test_rounding_ends_no_response():
    truth = table()
    whole = generation(truth)
    assert whole.scores
    ended = replace(whole, ids=whole.ids[:4], scores=whole.scores[:4], finish="stop", text="")
    comparison = compared([(whole, ended)], [truth])
    first = comparison.first_difference
    assert first
    assert (first.position, first.sides) == (4, ("left", "right"))
    [parting] = comparison.partings
    assert parting.has_ended


@pytest.mark.parametrize(
    ("change", "at"), [({"finish": "stop"}, 11), ({"text": "else"}, 11), ({"prompt_ids": (1, 2)}, 0)]
)
def test_what_differs_though_the_tokens_do_not(change: dict, at: int):
    truth = table()
    side = generation(truth)
    first = compared([(side, replace(side, **change))], [truth]).first_difference
    assert first
    assert first.position == at


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("sampling", [DRAWN, FILTERED, Sampling(temperature=1.0, top_k=1)])
def test_no_draw_is_a_false_alarm_and_one_at_another_temperature_is_found(
    sampling: Sampling, precision: Policy
):
    """Rounding far larger than real, so that tokens part often: by rounding all of it is explained."""
    sigma, partings, found = (3e-2, 0, 0) if precision == "fp32" else (1e-10, 0, 0)
    hot = replace(sampling, temperature=sampling.temperature / 2)
    for seed in range(60):
        truth = table(seed, tokens=10)
        pair = (
            generation(moved(truth, 1000 + seed, sigma), sampling),
            generation(moved(truth, 2000 + seed, sigma), sampling),
        )
        comparison = compared([pair], [truth], sampling=sampling, sigma=sigma, precision=precision)
        unexplained = [p for p in comparison.partings if not p.is_explained]
        assert not unexplained, (seed, unexplained)
        partings += len(comparison.partings)
        other = [(generation(truth, sampling), generation(truth, hot))]
        comparison = compared(other, [truth], sampling=sampling, precision=precision)
        found += any(p.departing == ("right",) for p in comparison.partings)
    assert partings > 3 or precision == "fp64"
    assert found > 40 or sampling.top_k == 1


def test_a_drawn_number_near_a_boundary_is_within_reach_of_both_tokens_and_of_no_third():
    truth = table()[0]
    shares = np.cumsum(np.exp(truth) / np.exp(truth).sum())
    movement = MeasuredMovement(truth, np.array([moved(truth[None], n)[0] for n in range(4)]))
    drawn = float(shares[10]) + 1e-7
    near = [t for t in range(V) if reach(t, truth, movement, Sampling(temperature=1.0), drawn).is_explained]
    assert near == [10, 11]
    fixed = [
        t
        for t in range(V)
        if reach(t, truth, FixedMovement(truth), Sampling(temperature=1.0), drawn).is_explained
    ]
    assert fixed == [11]


def test_a_token_at_a_filters_edge_may_be_kept_or_not():
    truth = np.linspace(3.0, 0.0, V)
    truth[5] = truth[4] - 1e-6  # the fifth and the sixth of five that are kept
    sampling = Sampling(temperature=1.0, top_k=5)
    movement = MeasuredMovement(truth, np.array([moved(truth[None], n)[0] for n in range(4)]))
    high = 0.999999
    assert reach(4, truth, movement, sampling, high).is_explained
    assert reach(5, truth, movement, sampling, high).is_explained
    assert not reach(6, truth, movement, sampling, high).is_explained
    assert not reach(5, truth, FixedMovement(truth), sampling, high).is_explained


def test_a_penalty_moves_the_error_with_the_logit():
    truth = np.array([2.0, 1.0, -4.0])
    draws = np.array([truth + 1e-3 * np.array([sign, 0, 0]) for sign in (1, -1)])
    plain = MeasuredMovement(truth, draws).of_difference(0)
    half = MeasuredMovement(penalised(truth, [0], 2.0), np.array([penalised(d, [0], 2.0) for d in draws]))
    assert half.of_difference(0) == pytest.approx(plain / 2)


def test_the_reference_is_asked_for_logits_only_where_both_sides_go_on():
    truth, order = tied(5, SIGMA)
    left, right = generation(truth), generation(nudged(truth, 5, order[1], 3 * SIGMA))
    assert rows_of([(left, right), (left, left)]) == [
        Row([*PROMPT], [*left.ids[:5]], True),
        Row([*PROMPT], [*left.ids], False),
    ]


def verdict(comparison: GenerationComparison, pairs: Sequence[Pair], looks: tuple = ()) -> GenerationVerdict:
    return GenerationVerdict(
        "fp64",
        ("jax", "torch"),
        "p.jsonl",
        pairs,
        comparison,
        looks,
        {},
        ["r.yaml", "--left", "jax", "--seed", "3"],
    )


def test_the_report_says_where_and_what_and_is_json(tmp_path: Path):
    truth, order = tied(5, 1e-3)
    pair = generation(truth), generation(nudged(truth, 5, order[1], 1.0))
    comparison = compared([pair], [truth], precision="fp64")
    looks = (
        CloserLook(("--no-cache",), ("right",), None),
        CloserLook(("--batch", "1"), ("right",), comparison.first_difference),
    )
    failed = verdict(comparison, [pair], looks)
    lines = "\n".join(failed.lines(colour=False))
    assert lines.startswith("FAIL  jax  vs  torch  in fp64, 1 prompt (p.jsonl)")
    assert "first difference: prompt 1, token 6, right: another token is chosen" in lines
    assert "what differs is in decoding" in lines
    assert "with --no-cache right agrees: the cache of keys and values is to blame" in lines
    assert "with --batch 1 right still differs, first at prompt 1, token 6" in lines
    assert "next: parity check r.yaml --left jax --precision fp64" in lines
    failed.write(tmp_path)
    said = json.loads((tmp_path / "generate.json").read_text())
    assert said["verdict"] == "fail"
    assert said["first_difference"]["position"] == 5
    assert said["responses"][0]["parting"]["right"]["token"] == order[1]
    assert said["tokens_left_out"] == 14
    passed = verdict(compared([(pair[0], pair[0])], [truth], precision="fp64"), [(pair[0], pair[0])])
    assert passed.lines(colour=False)[0].startswith("PASS")
    assert "--seed 3 --precision fp32" in passed.lines(colour=False)[-1]


def test_a_bound_that_shows_nothing_is_told():
    truth = table()
    pair = generation(truth), generation(truth)
    wide, narrow = (compared([pair], [truth], sigma=sigma) for sigma in (1.0, SIGMA))
    assert verdict(wide, [pair]).notes == [
        "100.0% of the log-probabilities have a bound of 1 or more in fp64, which shows nothing of them"
    ]
    assert not verdict(narrow, [pair]).notes
