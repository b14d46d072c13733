"""Conversion errors: against definitions, torch, dense grids, and the numbers published for real datasets."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, spearmanr

from pyiqa_qscorer.analysis.conversion_error import (
    LABELS,
    SIGNIFICANT_BITS,
    best_possible,
    decompose,
    make_label,
    named_score,
    optimal_values,
    round_to,
    uniform_errors,
    uniform_rounding_errors,
)
from pyiqa_qscorer.data.labels import level_centers, level_index, restore

RNG = np.random.default_rng(0)
MOS = np.concatenate([[1.0, 5.0, 3.0], 1 + 4 * RNG.beta(3, 2, 500)])
STD = RNG.uniform(0.2, 1.2, len(MOS))


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("levels", [2, 5, 11])
def test_every_label_has_a_row_per_image_and_names_a_score_of_the_scale(name: str, levels: int) -> None:
    label = make_label(name, MOS, STD, levels)
    assert label.shape == (len(MOS), levels)
    named = named_score(name, label)
    assert named.min() >= 1 - 1e-9 and named.max() <= 5 + 1e-9


def test_named_scores_and_optimal_values() -> None:
    assert named_score("one_hot", make_label("one_hot", [1.0, 1.9, 5.0], None, 5)) == pytest.approx([1.4, 2.2, 4.6])
    label = np.array([[0.0, 0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 2.0], [0.0] * 5])
    assert named_score("gaussian_pdf", label).tolist() == [2.5, 5.0, 3.0]
    narrow = make_label("gaussian_pdf_raw", [2.5], [0.001], 5)
    assert narrow.sum() == 0 and named_score("gaussian_pdf_raw", narrow).tolist() == [3.0]
    mos = MOS[(MOS <= 2.6) | (MOS > 3.4)]  # nothing in the middle level
    label = make_label("one_hot", mos, None, 5)
    values, index = optimal_values(label, mos), level_index(mos, 5)
    for level in (0, 1, 3, 4):
        assert values[level] == pytest.approx(mos[index == level].mean())
    assert values[2] == pytest.approx(3.0)  # keeps the middle of its interval
    label = make_label("one_hot", MOS, None, 5)
    named = restore(label, optimal_values(label, MOS))
    parts = decompose(MOS, named, restore(label, level_centers(5)))
    assert abs(parts.cross_term) < 1e-12 and parts.label_part > 0.01
    assert parts.restoration_part > 0.01


@pytest.mark.parametrize("name", LABELS)
def test_no_values_beat_the_optimal_ones(name: str) -> None:
    label = make_label(name, MOS, STD, 5)
    values = optimal_values(label, MOS)
    best = np.mean((restore(label, values) - MOS) ** 2)
    # The gradient vanishes, and any step makes it worse.
    assert np.abs(label.T @ (restore(label, values) - MOS)).max() / len(MOS) < 1e-9
    for _ in range(20):
        step = RNG.normal(0, 0.05, 5)
        assert np.mean((restore(label, values + step) - MOS) ** 2) >= best
    for kind in ("integers", "interval_centers"):
        assert np.mean((restore(label, level_centers(5, kind=kind)) - MOS) ** 2) >= best - 1e-12
    for tried in (level_centers(5), level_centers(5, kind="interval_centers"), values):  # the parts add up
        restored = restore(label, tried)
        parts = decompose(MOS, named_score(name, label), restored)
        assert parts.mse == pytest.approx(np.mean((restored - MOS) ** 2), rel=1e-12)
        assert parts.label_part + parts.restoration_part + parts.cross_term == pytest.approx(
            parts.mse, rel=1e-9, abs=1e-15
        )


@pytest.mark.parametrize("levels", range(2, 21))
def test_uniform_errors_are_the_stated_formulas(levels: int) -> None:
    mse, mae = uniform_errors(level_centers(levels))
    assert mse == pytest.approx(16 / (6 * levels * (levels - 1)))
    assert mae == pytest.approx(4 * (2 * levels - 1) / (6 * levels * (levels - 1)))
    mse, mae = uniform_errors(level_centers(levels, kind="interval_centers"))
    assert mse == pytest.approx((4 / levels) ** 2 / 12) and mae == pytest.approx(1 / levels)


@pytest.mark.parametrize("values", [[1.0, 3.0, 5.0], [4.9, 1.2, 2.0, 3.3], [-3.0, 9.0]])
def test_uniform_errors_of_any_values_against_a_dense_grid(values: list[float]) -> None:
    grid = 1 + 4 * (np.arange(400_000) + 0.5) / 400_000
    error = np.abs(np.array(values)[level_index(grid, len(values))] - grid)
    assert uniform_errors(values) == pytest.approx((np.mean(error**2), np.mean(error)), rel=1e-4)


@pytest.mark.parametrize("dtype", SIGNIFICANT_BITS)
def test_rounding_is_torchs_and_its_errors_those_of_draws(dtype: str) -> None:
    scores = np.concatenate([MOS, 1 + np.arange(257) / 256 + 2**-9, RNG.uniform(1, 5, 2000)])  # ties included
    if dtype != "float32":
        scores = scores.astype(np.float32).astype(np.float64)  # torch rounds a float64 to float32 on the way
    expected = torch.from_numpy(scores).to(getattr(torch, dtype)).double().numpy()
    assert round_to(scores, dtype).tolist() == expected.tolist()
    draws = RNG.uniform(1, 5, 200_000)
    error = np.abs(round_to(draws, dtype) - draws)
    assert uniform_rounding_errors(dtype) == pytest.approx((np.mean(error**2), np.mean(error)), rel=0.02)


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_no_split_into_levels_ranks_better_than_the_bound(levels: int) -> None:
    assert best_possible(levels) == pytest.approx((math.sqrt(1 - 1 / levels**2), math.sqrt(1 - 1 / levels)))
    mos = np.sort(np.round(RNG.uniform(1, 5, 240), 2))
    bound = best_possible(levels, np.unique(mos, return_counts=True)[1])
    even = np.repeat(np.arange(levels), 240 // levels)
    assert (spearmanr(even, mos).statistic, kendalltau(even, mos).statistic) == pytest.approx(bound, abs=0.01)
    for _ in range(30):
        level = np.searchsorted(np.sort(RNG.uniform(1, 5, levels - 1)), mos)
        values = RNG.permutation(np.sort(RNG.uniform(1, 5, levels)))
        if len(set(level)) > 1:
            assert spearmanr(values[level], mos).statistic <= bound[0] + 1e-12
            assert kendalltau(level, mos).statistic <= bound[1] + 1e-12
    assert best_possible(9, [3, 3, 3]) == best_possible(2, [7]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_label("hot", MOS, STD, 5), r"name must be one of one_hot, linear, .* got 'hot'"),
        (lambda: make_label("gaussian_pdf", MOS, None, 5), "made of the spread of opinions"),
        (lambda: round_to(MOS, "int8"), "dtype must be one of float32"),
    ],
)
def test_other_choices_are_refused_by_name(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
