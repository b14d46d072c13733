"""Uncertainty of correlations: bootstrap intervals, and whether one metric is really better than another.

Images are drawn with replacement by `scipy.stats.bootstrap` (B. Efron and R. Tibshirani, An Introduction to the
Bootstrap, 1993). The draws are a function of (seed, N) alone, so two metrics on the same images see the same draws, and
the difference of their bootstrap distributions is that of a paired comparison.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, kendalltau, norm

from ..data.labels import Floats
from .correlation import checked, srcc, undefined

RESAMPLES = 1000
LEVEL = 0.95
MINIMUM_IMAGES_FOR_COMPARISON = 10
KENDALL_LIMIT = 20_000  # images; 5 ms per draw of 10,000
_CELLS_AT_ONCE = 2_000_000

Measure = Literal["srcc", "plcc", "krcc"]


class ResampledSrcc(NamedTuple):
    """SRCC of a metric on N images, and of each draw of them: (resamples,), NaN where a draw is constant."""

    srcc: float
    draws: Floats


def resampled(measure: Measure, scores: ArrayLike, mos: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """SRCC, PLCC or KRCC (tau-b) of each draw of the N images: (resamples,), NaN where a draw is constant.

    The SRCC of 10,000 images takes about half a second.
    """
    pair: Sequence[np.ndarray] = checked(scores, mos)
    if measure == "srcc":  # of whole numbers, which rank faster
        pair = [np.unique(values, return_inverse=True)[1] for values in pair]
    elif measure == "plcc":
        pair = [values - values.mean() for values in pair]
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of draws that are constant, or of an interval that is not taken from scipy
        found = bootstrap(
            tuple(pair),
            _STATISTICS[measure],
            paired=True,
            vectorized=measure != "krcc",
            n_resamples=resamples,
            batch=max(1, _CELLS_AT_ONCE // len(pair[0])),
            method="percentile",
            random_state=np.random.default_rng([seed, len(pair[0])]),
        )
    return np.asarray(found.bootstrap_distribution, np.float64)


def interval(draws: Floats) -> tuple[float, float] | None:
    """95 % percentile interval of a resampled statistic; None where most draws were constant."""
    defined = draws[np.isfinite(draws)]
    if 2 * len(defined) < len(draws) or len(defined) < 2:
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def intervals(
    scores: ArrayLike, mos: ArrayLike, fitted: ArrayLike | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """95 % intervals of `srcc`, `plcc`, `krcc` and, with the fitted values given, `plcc_fitted`.

    The curve is not fitted anew to each draw: its interval is that of the correlation, the curve being given.
    None where a statistic is not defined, and for `krcc` beyond `KENDALL_LIMIT` images.
    """
    scores, mos = checked(scores, mos)
    found: dict[str, tuple[float, float] | None] = dict.fromkeys(("srcc", "plcc", "krcc", "plcc_fitted"))
    if undefined(scores, mos) is None:
        measures: tuple[Measure, ...] = ("srcc", "plcc", "krcc") if len(scores) <= KENDALL_LIMIT else ("srcc", "plcc")
        found |= {name: interval(resampled(name, scores, mos, resamples, seed)) for name in measures}
        if fitted is not None:
            found["plcc_fitted"] = interval(resampled("plcc", fitted, mos, resamples, seed))
    return found


def resampled_srcc(
    scores: ArrayLike, mos: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> ResampledSrcc | None:
    """What `compare` takes of a metric; None: no SRCC, or fewer than `MINIMUM_IMAGES_FOR_COMPARISON` images."""
    pair = checked(scores, mos)
    if len(pair[0]) < MINIMUM_IMAGES_FOR_COMPARISON or undefined(*pair):
        return None
    return ResampledSrcc(srcc(*pair), resampled("srcc", *pair, resamples, seed))


def compare(first: ResampledSrcc, second: ResampledSrcc) -> tuple[float, float]:
    """Paired bootstrap test of the difference of two metrics' SRCC on the same images, in the same draws.

    The standard error of the difference is its spread over draws of whole images, so the correlation between the two
    metrics counts; the difference over it is compared with the normal distribution (Efron and Tibshirani 1993, section
    16; unlike a count of draws, that resolves the small p-values that many comparisons at once need).

    Returns:
        SRCC of the first minus SRCC of the second; and p, two-sided: the chance of a difference at least this large if
        there were none.
    """
    difference, spread = first.srcc - second.srcc, first.draws - second.draws
    defined = spread[np.isfinite(spread)]
    error = float(np.std(defined, ddof=1)) if len(defined) > 1 else 0.0
    if error < 1e-12:  # equal ranks, or so few images that no draw ever differs
        return difference, 1.0 if abs(difference) < 1e-12 else 1 / (1 + len(spread))
    return difference, float(2 * norm.sf(abs(difference) / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (S. Holm, A simple sequentially rejective multiple test procedure, 1979).

    >>> holm([0.01, 0.04])
    [0.02, 0.04]
    """
    order = np.argsort(p_values)
    raised = np.arange(len(order), 0, -1) * np.asarray(p_values, np.float64)[order]
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1)
    return adjusted.tolist()


def _ranks(groups: np.ndarray) -> Floats:
    """Mean ranks within each row of (..., N) group numbers below N. `rankdata` gives the same, 20 times slower."""
    table = groups.reshape(-1, groups.shape[-1])
    rows, images = table.shape
    totals = np.bincount((table + images * np.arange(rows)[:, None]).ravel(), minlength=rows * images)
    totals = totals.reshape(rows, images)
    middles = np.cumsum(totals, axis=1) - (totals - 1) / 2
    return np.take_along_axis(middles, table, axis=1).reshape(groups.shape)


def _pearson(first: Floats, second: Floats) -> Floats:
    """Pearson correlation within each row of (..., N) values; NaN where one is constant."""
    scaled = []
    for values in (first, second):
        centred = values - values.mean(axis=-1, keepdims=True)
        size = np.linalg.norm(centred, axis=-1, keepdims=True)
        constant = size <= 1e-13 * np.abs(values).max() * np.sqrt(values.shape[-1])
        scaled.append(np.where(constant, np.nan, centred / size))
    return np.clip(np.sum(scaled[0] * scaled[1], axis=-1), -1, 1)


_STATISTICS: dict[str, Callable[..., Any]] = {
    "srcc": lambda first, second, axis: _pearson(_ranks(first), _ranks(second)),
    "plcc": lambda first, second, axis: _pearson(first, second),
    "krcc": lambda first, second: kendalltau(first, second, method="asymptotic").statistic,
}
