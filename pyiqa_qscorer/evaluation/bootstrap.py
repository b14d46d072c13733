"""Uncertainty of correlations: bootstrap intervals, and whether one metric is really better than another.

Images are drawn with replacement (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993). A draw of N
images is kept as how often each was drawn, which gives ranks and ties of all draws by cumulative sums, without a sort.
The draws are a function of (seed, N) alone, so two metrics on the same images see the same draws: paired comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from .correlation import Floats, checked, srcc, undefined

RESAMPLES = 1000
LEVEL = 0.95
MINIMUM_IMAGES_FOR_COMPARISON = 10
KENDALL_LIMIT = 20_000  # images; the work grows with their square
_CELLS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Resampled:
    """SRCC of a metric on N images, and of each draw of them: (resamples,), NaN where a draw is constant."""

    srcc: float
    draws: Floats


@dataclass(frozen=True)
class Comparison:
    """Whether two metrics differ on the same images.

    Attributes:
        difference: SRCC of the first minus SRCC of the second.
        error: Standard error of the difference.
        p: Two-sided; the chance of a difference at least this large if there were none.
    """

    difference: float
    error: float
    p: float


def draws(images: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[Floats]:
    """Blocks (b, N) of counts: how often each of N images was drawn, each row summing to N."""
    generator = np.random.default_rng([seed, images])
    at_once = max(1, _CELLS_AT_ONCE // images)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = generator.integers(images, size=(rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)


def resampled_srcc(scores: ArrayLike, mos: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """SRCC of each draw: (resamples,), NaN where a draw is constant."""
    groups = [_groups(values) for values in checked(scores, mos)]
    found = []
    for counts in draws(len(groups[0][0]), resamples, seed):
        found.append(_weighted_pearson(_ranks(groups[0], counts), _ranks(groups[1], counts), counts))
    return np.concatenate(found)


def resampled_plcc(scores: ArrayLike, mos: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """PLCC of each draw: (resamples,), NaN where a draw is constant."""
    first, second = (values - values.mean() for values in checked(scores, mos))
    return np.concatenate(
        [_weighted_pearson(first[None], second[None], counts) for counts in draws(len(first), resamples, seed)]
    )


def resampled_krcc(scores: ArrayLike, mos: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """KRCC (tau-b) of each draw: (resamples,), NaN where a draw is constant. N squared work."""
    groups = [_groups(values) for values in checked(scores, mos)]
    images = len(groups[0][0])
    counts = np.concatenate(list(draws(images, resamples, seed)))
    exact = counts.astype(np.float32)  # sums of whole numbers up to N < 2**24 are exact
    agreeing = np.zeros(len(counts))
    rows = max(1, _CELLS_AT_ONCE // images)
    for start in range(0, images, rows):
        part = slice(start, start + rows)
        signs = [np.sign(values[part, None] - values[None]).astype(np.int8) for values, _, _ in groups]
        pairs = (signs[0] * signs[1]).astype(np.float32)  # concordant 1, discordant -1, tied 0
        agreeing += (counts[:, part] * (exact @ pairs.T)).sum(1)
    untied = []
    for group in groups:
        totals = _totals(group, counts)
        untied.append(images * (images - 1) - (totals * (totals - 1)).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return agreeing / np.sqrt(untied[0] * untied[1])


def interval(resampled: Floats, level: float = LEVEL) -> tuple[float, float] | None:
    """Percentile interval of a resampled statistic; None where most draws were constant."""
    defined = resampled[np.isfinite(resampled)]
    if 2 * len(defined) < len(resampled) or len(defined) < 2:
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def intervals(
    scores: ArrayLike, mos: ArrayLike, fitted: ArrayLike | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """95 % intervals of `srcc`, `plcc`, `krcc` and, with the fitted values given, `plcc_fitted`.

    The curve is not fitted anew to each draw: its interval is that of the correlation, the curve being given.
    None where a statistic is not defined, and for `krcc` beyond `KENDALL_LIMIT` images.
    """
    names = ("srcc", "plcc", "krcc", "plcc_fitted")
    found: dict[str, tuple[float, float] | None] = dict.fromkeys(names)
    images = len(checked(scores, mos)[0])
    if undefined(*checked(scores, mos)) is not None:
        return found
    found["srcc"] = interval(resampled_srcc(scores, mos, resamples, seed))
    found["plcc"] = interval(resampled_plcc(scores, mos, resamples, seed))
    if images <= KENDALL_LIMIT:
        found["krcc"] = interval(resampled_krcc(scores, mos, resamples, seed))
    if fitted is not None:
        found["plcc_fitted"] = interval(resampled_plcc(fitted, mos, resamples, seed))
    return found


def resample(scores: ArrayLike, mos: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Resampled | None:
    """What `compare` takes of a metric.

    Returns:
        None where its SRCC is not defined or there are fewer than `MINIMUM_IMAGES_FOR_COMPARISON` images.
    """
    pair = checked(scores, mos)
    if len(pair[0]) < MINIMUM_IMAGES_FOR_COMPARISON or undefined(*pair) is not None:
        return None
    return Resampled(srcc(*pair), resampled_srcc(*pair, resamples, seed))


def compare(first: Resampled, second: Resampled) -> Comparison:
    """Paired bootstrap test of the difference of two metrics' SRCC on the same images, in the same draws.

    The standard error of the difference is its spread over draws of whole images, so the correlation between the two
    metrics counts; the difference over it is compared with the normal distribution (Efron and Tibshirani 1993, section
    16; unlike a count of draws, that resolves the small p-values that many comparisons at once need).
    """
    difference, spread = first.srcc - second.srcc, first.draws - second.draws
    defined = spread[np.isfinite(spread)]
    error = float(np.std(defined, ddof=1)) if len(defined) > 1 else 0.0
    if error < 1e-12:  # equal ranks, or so few images that no draw ever differs
        return Comparison(difference, error, 1.0 if abs(difference) < 1e-12 else 1 / (1 + len(spread)))
    return Comparison(difference, error, float(2 * norm.sf(abs(difference) / error)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (S. Holm, A simple sequentially rejective multiple test procedure, 1979)."""
    count = len(p_values)
    adjusted = [0.0] * count
    largest = 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


# --- counts instead of copies -----------------------------------------------------------------------------------------

_Groups = tuple[np.ndarray, np.ndarray, np.ndarray]


def _groups(values: Floats) -> _Groups:
    """Group of equal values that each image is in, from the smallest; images by group; where each group starts."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return group, np.argsort(group, kind="stable"), np.concatenate([[0], np.cumsum(sizes)[:-1]])


def _totals(groups: _Groups, counts: Floats) -> Floats:
    _, order, starts = groups
    totals: Floats = np.add.reduceat(counts[:, order], starts, axis=1)
    return totals


def _ranks(groups: _Groups, counts: Floats) -> Floats:
    """Mean rank of each image in each draw, (b, N): equal values, and copies of an image, share it."""
    totals = _totals(groups, counts)
    ranks = np.cumsum(totals, axis=1) - (totals - 1) / 2
    return ranks[:, groups[0]]


def _weighted_pearson(first: Floats, second: Floats, counts: Floats) -> Floats:
    """Pearson correlation per row; rows of `first` and `second` are (N,) values, repeated `counts` times."""
    images = counts.shape[1]
    first = first - (counts * first).sum(1, keepdims=True) / images
    second = second - (counts * second).sum(1, keepdims=True) / images
    variances = (counts * first**2).sum(1), (counts * second**2).sum(1)
    scale = np.abs(first).max(), np.abs(second).max()
    constant = (variances[0] <= images * (1e-13 * scale[0]) ** 2) | (variances[1] <= images * (1e-13 * scale[1]) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (counts * first * second).sum(1) / np.sqrt(variances[0]) / np.sqrt(variances[1])
    return np.where(constant, np.nan, np.clip(found, -1, 1))
