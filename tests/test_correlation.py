"""Correlations against scipy and the published fit; their uncertainty against brute force and known truths."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pyiqa_qscorer.evaluation import bootstrap
from pyiqa_qscorer.evaluation.correlation import correlations, fit_logistic

CASES = json.loads((Path(__file__).parent / "golden/metrics/metrics.json").read_text())


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def sample(count: int, seed: int = 0, decimals: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Correlated, with ties."""
    generator = np.random.default_rng(seed)
    mos = generator.normal(size=count)
    return np.round(mos + generator.normal(size=count), decimals), np.round(mos, decimals)


@pytest.mark.parametrize("name", CASES)
def test_published_logistic_fit(name: str) -> None:
    case = CASES[name]
    found = correlations(case["pred"], case["gt"])
    assert found.fit is not None
    np.testing.assert_allclose(found.fit(case["pred"]), case["logistic_4params"]["fit"], rtol=0, atol=1e-7)
    assert found.plcc_fitted == pytest.approx(case["logistic_4params"]["plcc"], abs=1e-9)
    assert found.srcc == pytest.approx(case["raw_srcc"], abs=1e-12)
    assert found.plcc == pytest.approx(case["raw_plcc"], abs=1e-12)
    # The published script takes its SRCC of the fitted values: positive even where the relation decreases.
    fitted = correlations(found.fit(case["pred"]), case["gt"], fit=False)
    assert fitted.srcc == pytest.approx(case["logistic_4params"]["srcc"], abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(-5, 5), st.floats(-1e6, 1e6).map(lambda v: round(v, 2))), min_size=3, max_size=40)
)
def test_equal_to_scipy(pairs: list[tuple[int, float]]) -> None:
    scores, mos = (np.array(values, float) for values in zip(*pairs, strict=True))
    found = correlations(scores, mos, fit=False)
    if len(set(scores)) == 1 or len(set(mos)) == 1:
        assert (found.srcc, found.plcc, found.krcc) == (None, None, None) and found.problem is not None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = stats.spearmanr(scores, mos)[0], stats.pearsonr(scores, mos)[0], stats.kendalltau(scores, mos)[0]
    assert (found.srcc, found.plcc, found.krcc) == pytest.approx(expected, abs=1e-12)
    assert found.rmse == pytest.approx(math.sqrt(np.mean((scores - mos) ** 2)))


@pytest.mark.parametrize(
    ("scores", "mos", "problem"),
    [
        ([], [], "0 images: a correlation needs at least 3"),
        ([1, 2], [1, 2], "2 images"),
        ([3, 3, 3], [1, 2, 3], "all 3 scores are 3"),
        ([1, 2, 3], [4, 4, 4], "all 3 opinions are 4"),
        ([1e8, 1e8 + 1e-8, 1e8], [1, 2, 3], "all 3 scores are 1e"),
    ],
)
def test_undefined_is_said_in_words(scores: list, mos: list, problem: str) -> None:
    found = correlations(scores, mos)
    assert (found.srcc, found.plcc, found.krcc, found.fit) == (None, None, None, None)
    assert found.problem is not None and problem in found.problem
    assert set(bootstrap.intervals(scores, mos).values()) == {None}


@pytest.mark.parametrize(
    ("scores", "mos", "words"),
    [([1, math.nan], [1, 2], "finite"), ([1, 2, 3], [1, 2], "one length"), ([[1], [2]], [1, 2], r"shape \(N,\)")],
)
def test_what_is_no_vector_of_numbers_is_refused(scores: list, mos: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        correlations(scores, mos)


def test_fit_finds_the_curve_and_no_bad_optimum() -> None:
    assert "needs at least 4" in str(fit_logistic([1, 2, 3], [1, 2, 3]))
    assert "all 4 scores" in str(fit_logistic([1, 1, 1, 1], [1, 2, 3, 4]))
    three = correlations([1, 2, 4], [1, 2, 3])
    assert three.srcc == pytest.approx(1) and three.fit is None and "4" in str(three.fit_problem)
    scores = np.linspace(-3, 5, 60)
    fit = fit_logistic(scores, 1 + 3.5 / (1 + np.exp(-(scores - 0.7) / 0.9)))
    assert not isinstance(fit, str)
    assert (fit.top, fit.bottom, fit.middle, fit.width) == pytest.approx((4.5, 1, 0.7, 0.9), abs=1e-6)
    generator = np.random.default_rng(5)
    scores = generator.gamma(1.2, 20, 200)
    mos = 90 / (1 + np.exp((scores - 25) / 6)) + generator.normal(size=200)
    rising, falling = correlations(-scores, mos), correlations(scores, mos)
    assert falling.plcc_fitted == pytest.approx(rising.plcc_fitted, abs=1e-6) and rising.plcc_fitted > 0.99


def test_resampled_correlations_are_those_of_the_drawn_images_constant_draws_left_out() -> None:
    scores, mos = sample(60)
    drawn = np.random.default_rng([4, 60]).integers(0, 60, (30, 60))  # the same draws for all: paired comparison
    for measure, reference in (("srcc", stats.spearmanr), ("plcc", stats.pearsonr), ("krcc", stats.kendalltau)):
        expected = [reference(scores[row], mos[row])[0] for row in drawn]
        np.testing.assert_allclose(bootstrap.resampled(measure, scores, mos, 30, seed=4), expected, rtol=0, atol=1e-12)
    # A draw of three images often holds one image three times.
    found = bootstrap.resampled("srcc", [1, 2, 3], [1, 3, 2], 500)
    assert np.isnan(found).any() and np.nanmax(found) <= 1 and bootstrap.interval(found) is not None
    assert bootstrap.interval(np.full(10, np.nan)) is None


def test_intervals_are_reproducible_and_cover_the_truth_as_often_as_they_say() -> None:
    scores, mos = sample(80)
    first, again, other = (bootstrap.intervals(scores, mos, mos, 400, seed) for seed in (0, 0, 1))
    assert first == again != other
    for name, value in (("srcc", "srcc"), ("plcc", "plcc"), ("krcc", "krcc")):
        low, high = first[name]
        assert low < getattr(correlations(scores, mos), value) < high
    assert first["plcc_fitted"] == pytest.approx((1, 1))
    truth = 6 / math.pi * math.asin(math.sqrt(0.5) / 2)  # Spearman of a normal pair with Pearson sqrt(1/2)
    covered = 0
    for seed in range(150):
        low, high = bootstrap.interval(bootstrap.resampled("srcc", *sample(80, seed, 9), 200, seed))
        covered += low <= truth <= high
    assert 0.88 <= covered / 150 <= 0.99


def test_comparisons() -> None:
    generator = np.random.default_rng(1)
    false_alarms = found = 0
    for _ in range(100):
        mos = generator.normal(size=60)
        first, second, worse = (mos + noise * generator.normal(size=60) for noise in (0.6, 0.6, 1.6))
        one, other, third = (bootstrap.resampled_srcc(scores, mos, 200) for scores in (first, second, worse))
        false_alarms += bootstrap.compare(one, other)[1] < 0.05
        found += bootstrap.compare(one, third)[1] < 0.05
    assert false_alarms <= 11  # three standard errors above 5 %
    assert found >= 75
    scores, mos = sample(40)
    own, perfect = bootstrap.resampled_srcc(scores, mos), bootstrap.resampled_srcc(mos, mos)
    assert bootstrap.compare(own, bootstrap.resampled_srcc(2 * scores + 1, mos)) == (0, 1)
    assert bootstrap.resampled_srcc(scores[:9], mos[:9]) is None
    assert bootstrap.resampled_srcc(scores[:10], mos[:10]) is not None
    assert bootstrap.resampled_srcc(np.ones(40), mos) is None
    (better, chance), (worse, same_chance) = bootstrap.compare(perfect, own), bootstrap.compare(own, perfect)
    assert better == -worse and chance == same_chance < 0.01
    # The example of Holm's step-down: 0.01 x 4, 0.02 x 3, then never below the one before.
    assert bootstrap.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert bootstrap.holm([]) == [] and bootstrap.holm([0.9, 0.8]) == [1.0, 1.0]
