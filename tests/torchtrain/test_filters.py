"""The filters of `trainspec.generation.choice` beside transformers' own logits processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trainspec.generation.choice import Sampling, penalised, probabilities

CASES = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 1.3, "repetition_penalty": 1.7},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
]


def theirs(logits: torch.Tensor, seen: list[int], sampling: Sampling) -> np.ndarray:
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    for value, kind in (
        (sampling.top_k, TopKLogitsWarper),
        (sampling.top_p, TopPLogitsWarper),
        (sampling.min_p, MinPLogitsWarper),
    ):
        if value is not None:
            chain.append(kind(value))
    return chain(torch.tensor([seen]), logits[None].clone()).softmax(-1)[0].numpy()


@pytest.mark.parametrize("setting", CASES)
def test_filters_are_those_of_transformers(setting: dict):
    rng, sampling = np.random.default_rng(5), Sampling(**setting)
    for _ in range(50):
        logits = rng.normal(scale=3.0, size=200)
        seen = rng.integers(0, 200, 30).tolist()
        ours = probabilities(penalised(logits, seen, sampling.repetition_penalty), sampling)
        wanted = theirs(torch.from_numpy(logits), seen, sampling)
        assert np.array_equal(ours > 0, wanted > 0)
        np.testing.assert_allclose(ours, wanted, rtol=1e-12, atol=1e-300)
        # Control: another setting is another distribution.
        other = Sampling(**setting | {"temperature": sampling.temperature * 1.01})
        assert not np.allclose(
            probabilities(penalised(logits, seen, other.repetition_penalty), other), wanted
        )
