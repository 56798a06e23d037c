"""A draw rounds what is stored in bfloat16 as bfloat16 is rounded: to nearest, numbers near each other alike."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from launch import launch

from trainspec.step import RMS_ROUNDING

Found = list[dict[str, np.ndarray]]
DRAWS, UNIT = 8, 2.0**-8
SPREAD = np.exp(np.random.default_rng(0).uniform(-10, 10, 4000)) * np.random.default_rng(1).choice(
    (-1, 1), 4000
)
# Within a hundredth of a last place of each other.
NEAR = 1.2345 * (1 + UNIT / 100 * np.random.default_rng(2).uniform(-1, 1, 400))
# Too little to reach the next number from one that is stored.
SMALL = UNIT / 10


def made(tmp_path: Path, numbers: np.ndarray, *, unit: float = UNIT) -> Found:
    small = SMALL * numbers
    cases = {"numbers": numbers.tolist(), "small": small.tolist(), "unit": unit, "draws": DRAWS}
    (out,) = launch("stored_roundings.py", cases, tmp_path)
    return [{name: np.array(array) for name, array in each.items()} for each in json.loads(out.read_text())]


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return made(tmp_path_factory.mktemp("spread"), SPREAD)


def test_the_first_draw_is_of_bfloat16_itself(spread: Found):
    stored = SPREAD.astype(ml_dtypes.bfloat16).astype(np.float64)
    for name in ("stored", "cotangent"):
        np.testing.assert_array_equal(spread[0][name], stored)


def test_every_draw_rounds_as_far_and_each_elsewhere(spread: Found):
    for draw in spread:
        for name in ("stored", "cotangent"):
            relative = draw[name] / SPREAD - 1
            assert np.sqrt(np.mean(relative**2)) == pytest.approx(RMS_ROUNDING * UNIT, rel=0.05)
            assert np.abs(relative).max() <= UNIT
    errors = np.array([draw["stored"] / SPREAD - 1 for draw in spread])
    apart = np.corrcoef(errors) - np.eye(DRAWS)
    assert np.abs(apart).max() < 0.1


def test_a_small_term_is_lost_beside_a_stored_number(spread: Found):
    for draw in spread:
        np.testing.assert_array_equal(draw["summed"], draw["stored"])


def test_near_numbers_move_alike_in_bfloat16_and_at_random_in_float32(tmp_path: Path):
    """The mean of many is moved as far as each of them, or by what is left of random signs."""
    for unit, alike in ((UNIT, True), (2.0**-24, False)):
        errors = np.array([draw["stored"] - NEAR for draw in made(tmp_path, NEAR, unit=unit)])
        mean, each = np.abs(errors.mean(axis=1)), np.sqrt(np.mean(errors**2, axis=1))
        assert np.all(mean > 0.9 * each) if alike else np.all(mean < 0.3 * each)
