"""Ceilings of rank correlation, against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyiqa_qscorer.analysis.ceilings import best_possible, correlations, one_hot_ceilings
from pyiqa_qscorer.data.labels import level_index

RNG = np.random.default_rng(0)


def by_scipy(level: np.ndarray, mos: np.ndarray) -> tuple[float, float]:
    return float(stats.spearmanr(level, mos).statistic), float(stats.kendalltau(level, mos).statistic)


def counts(mos: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    return np.bincount(level_index(mos, levels), minlength=levels), np.unique(mos, return_counts=True)[1]


@pytest.mark.parametrize("levels", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_closed_form_is_scipys_with_and_without_ties(levels: int, decimals: int) -> None:
    mos = np.round(1 + 4 * RNG.beta(4, 2, 700), decimals)
    assert one_hot_ceilings(*counts(mos, levels)) == pytest.approx(by_scipy(level_index(mos, levels), mos), abs=1e-12)


@given(st.lists(st.integers(4, 20), min_size=2, max_size=40), st.integers(2, 9))
def test_closed_form_is_scipys_on_any_few_images(quarters: list[int], levels: int) -> None:
    mos = np.array(quarters) / 4
    level = level_index(mos, levels)
    found = one_hot_ceilings(*counts(mos, levels))
    if np.ptp(level) == 0:
        assert all(math.isnan(value) for value in found)
    else:
        assert found == pytest.approx(by_scipy(level, mos), abs=1e-9)


def test_nothing_restored_from_a_level_ranks_better() -> None:
    mos = RNG.uniform(1, 5, 400)
    level = level_index(mos, 5)
    srcc, _ = one_hot_ceilings(*counts(mos, 5))
    for _ in range(50):
        values = RNG.permutation(np.sort(RNG.uniform(1, 5, 5)))
        assert stats.spearmanr(values[level], mos).statistic <= srcc + 1e-12


def test_equal_filling_is_the_bound_of_every_split() -> None:
    assert best_possible(5) == pytest.approx((math.sqrt(0.96), math.sqrt(0.8)))
    ranks = np.arange(1000)
    mos = 1 + 4 * ranks / 999
    ties = np.ones(1000)
    equal = one_hot_ceilings(np.full(5, 200), ties)
    assert equal == pytest.approx(best_possible(5, ties), abs=1e-12)
    assert equal == pytest.approx(best_possible(5), abs=1e-3)
    for _ in range(50):
        level = np.searchsorted(np.sort(RNG.choice(ranks[1:], 4, replace=False)), ranks, side="right")
        found = one_hot_ceilings(np.bincount(level, minlength=5), ties)
        assert found == pytest.approx(by_scipy(level, mos), abs=1e-9)
        assert found[0] <= equal[0] + 1e-12
        assert found[1] <= equal[1] + 1e-12


def test_the_bound_never_exceeds_one() -> None:
    assert best_possible(9, [3, 3, 3]) == (1.0, 1.0)
    assert best_possible(2, [7]) == (1.0, 1.0)


def test_a_constant_side_has_no_ceiling() -> None:
    assert all(math.isnan(value) for value in one_hot_ceilings([0, 9, 0], np.ones(9)))
    assert all(math.isnan(value) for value in one_hot_ceilings([9], [9]))
    assert all(math.isnan(value) for value in correlations(np.ones(4), np.arange(4.0)))
    assert all(math.isnan(value) for value in correlations(np.ones(1), np.ones(1)))


def test_counts_of_different_images_are_refused() -> None:
    with pytest.raises(ValueError, match="must count the same images, got 3 and 4"):
        one_hot_ceilings([1, 2], [4])
    with pytest.raises(ValueError, match="got 0 and 0"):
        one_hot_ceilings([0], [0])


def test_correlations_take_rounding_for_ties() -> None:
    mos = np.repeat([1.5, 2.5, 3.5], 40)
    noisy = mos + RNG.uniform(-1, 1, 120) * 1e-14
    assert correlations(noisy, mos) == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)
