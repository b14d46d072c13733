"""Conversion errors of all formulations on one dataset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.labels import Floats, level_centers, level_index, restore
from ..data.opinions import HIGH, LOW, Opinions
from .conversion_error import (
    SIGNIFICANT_BITS,
    WITH_STD,
    best_possible,
    decompose,
    error_against,
    make_label,
    named_score,
    optimal_values,
    round_to,
    uniform_errors,
    uniform_rounding_errors,
)
from .simulation import NoiseError, noisy_levels, noisy_regression

SAMPLE = 50_000
"""Images that labels other than one-hot are made of; one-hot figures come from every image of a larger dataset too."""
DECIMALS = 9
"""Scores nearer than this are equal but for rounding, e.g. of one level restored in two rows."""
NOISE_IMAGES = 2000
NOISES = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
LEAKS = (0.0, 0.01, 0.05, 0.1)


@dataclass(frozen=True)
class ErrorRow:
    """Conversion error of one formulation on a dataset.

    Attributes:
        label: one of `conversion_error.LABELS`, or `score_token` (regression beside a score token).
        values: what the levels stand for; of a score token the number format.
        levels: K; None for a score token.
        images: how many the row is computed from.
        mae_standard_error: of drawing these images from the dataset; 0 where they are all of it.
        label_part, restoration_part, cross_term: parts of `mse`, see `conversion_error.decompose`.
        srcc, plcc, krcc: of restored scores with the MOS: the ceiling for a network that predicts every label exactly;
            None where one side is constant.
        uniform_mae, uniform_mse: closed form for a uniform MOS; None where there is none, or where the values are of
            this dataset.
    """

    label: str
    values: str
    levels: int | None
    images: int
    mae: float
    mae_standard_error: float
    rmse: float
    mse: float
    bias: float
    max_error: float
    label_part: float
    restoration_part: float
    cross_term: float
    srcc: float | None
    plcc: float | None
    krcc: float | None
    uniform_mae: float | None = None
    uniform_mse: float | None = None


@dataclass(frozen=True)
class LeakRow:
    """Mean absolute error where `share` of the probability, in [0, 1), goes to words that are no level.

    Softmax over the levels alone makes up for it; the sum over the vocabulary restores (1 - share) times the score, so
    the error becomes (1 - share) restored - y: always a bias towards 0.
    """

    label: str
    levels: int
    share: float
    mae: float


@dataclass(frozen=True)
class Study:
    """All that `study` finds.

    Attributes:
        detail: K of the tables and pictures for one number of levels.
        histogram: (64,) images per equal part of 1..5.
        bounds: by number of levels, the SRCC and KRCC that no split of this dataset into so many levels exceeds.
        level_shares: (detail,) share of images per one-hot level.
        soft_shares: mean label per level (detail,), divided by its sum, by name of the Gaussian label.
        level_values: (detail,) optimal values of the one-hot levels.
        sample: MOS and spread of the images that labels other than one-hot are made of.
    """

    opinions: Opinions
    detail: int
    rows: list[ErrorRow]
    leaks: list[LeakRow]
    noise: list[NoiseError]
    histogram: NDArray[np.int64]
    bounds: dict[int, tuple[float, float]]
    level_shares: Floats
    soft_shares: dict[str, Floats]
    level_values: Floats
    sample: tuple[Floats, Floats]

    def of(self, label: str, values: str) -> list[ErrorRow]:
        """The rows of a formulation, by number of levels; none where the dataset has no spreads for it."""
        return [row for row in self.rows if (row.label, row.values) == (label, values)]

    def row(self, label: str, values: str, levels: int | None) -> ErrorRow | None:
        """The row of a formulation for one number of levels, None where there is none."""
        return next((row for row in self.of(label, values) if row.levels == levels), None)


def study(opinions: Opinions, levels: Sequence[int] = range(2, 21), detail: int = 5, seed: int = 0) -> Study:
    """Measure every formulation for every number of levels; Gaussian labels where there are spreads.

    Args:
        levels: numbers of levels, each at least 2, else `ValueError`.
        detail: number of levels that leaks, noise and pictures are computed for; added to `levels`.
        seed: of samples and simulations.
    """
    wanted = sorted({*levels, detail})
    if wanted[0] < 2:
        raise ValueError(f"levels must be at least 2, got {wanted[0]}: one level tells nothing")
    every = opinions.mos
    mos, std = opinions.sample(SAMPLE, seed)
    mos_with_std, only_std = opinions.sample(SAMPLE, seed, only_with_std=True)
    known = opinions.images - opinions.missing_std
    rows = [row for count in wanted for row in _one_hot_rows(every, count)]
    for count in wanted:
        rows += _soft_rows("linear", mos, None, count, opinions.images)
        if opinions.has_std:
            rows += [row for name in WITH_STD for row in _soft_rows(name, mos_with_std, only_std, count, known)]
    for dtype in SIGNIFICANT_BITS:
        rounded = round_to(mos, dtype), opinions.images, uniform_rounding_errors(dtype)
        rows.append(_row("score_token", dtype, None, mos, mos, *rounded))
    soft = {
        name: label.mean(axis=0) / label.mean(axis=0).sum()
        for name in WITH_STD
        if opinions.has_std and not name.endswith("normalised")
        for label in [make_label(name, mos_with_std, only_std, detail)]
    }
    ties = np.unique(np.round(every, DECIMALS), return_counts=True)[1]
    return Study(
        opinions=opinions,
        detail=detail,
        rows=rows,
        leaks=_leaks(mos, mos_with_std if opinions.has_std else None, only_std, detail),
        noise=_noise(opinions, detail, seed),
        histogram=np.histogram(every, bins=64, range=(LOW, HIGH))[0],
        bounds={count: best_possible(count, ties) for count in wanted},
        level_shares=np.bincount(level_index(every, detail), minlength=detail) / opinions.images,
        soft_shares=soft,
        level_values=_level_means(every, detail),
        sample=(mos, std),
    )


def _row(
    label: str,
    values: str,
    levels: int | None,
    mos: Floats,
    named: Floats,
    restored: Floats,
    of: int,
    uniform: tuple[float, float] | tuple[None, None] = (None, None),
) -> ErrorRow:
    """Error of restored scores, arguments as for `decompose`, from a dataset of size `of`; and its closed form."""
    error = np.abs(restored - mos)
    return ErrorRow(
        label=label,
        values=values,
        levels=levels,
        images=len(mos),
        mae_standard_error=0.0 if len(mos) == of else float(error.std()) / math.sqrt(len(mos)),
        max_error=float(error.max()),
        **vars(decompose(mos, named, restored)),
        **vars(error_against(restored, mos, DECIMALS)),
        uniform_mae=uniform[1],
        uniform_mse=uniform[0],
    )


def _level_means(mos: Floats, levels: int) -> Floats:
    """Mean MOS of each level (K,), its optimal value; a level without images keeps the middle of its interval."""
    index = level_index(mos, levels)
    counts = np.bincount(index, minlength=levels)
    means = level_centers(levels, kind="interval_centers")
    return np.divide(np.bincount(index, weights=mos, minlength=levels), counts, out=means, where=counts > 0)


def _one_hot_rows(mos: Floats, levels: int) -> list[ErrorRow]:
    index, middles = level_index(mos, levels), level_centers(levels, kind="interval_centers")
    kinds = {"integers": level_centers(levels), "interval_centers": middles, "optimal": _level_means(mos, levels)}
    rows = []
    for kind, values in kinds.items():
        uniform = (None, None) if kind == "optimal" else uniform_errors(values)
        rows.append(_row("one_hot", kind, levels, mos, middles[index], values[index], len(mos), uniform))
    return rows


def _soft_rows(name: str, mos: Floats, std: Floats | None, levels: int, of: int) -> list[ErrorRow]:
    label = make_label(name, mos, std, levels)
    named = named_score(name, label)
    restored = restore(label, level_centers(levels))
    if name == "linear":
        return [_row(name, "integers", levels, mos, named, restored, of, (0.0, 0.0))]
    best = restore(label, optimal_values(label, mos))
    return [
        _row(name, "integers", levels, mos, named, restored, of),
        _row(name, "optimal", levels, mos, named, best, of),
    ]


def _leaks(mos: Floats, mos_with_std: Floats | None, std: Floats, detail: int) -> list[LeakRow]:
    labels = {"one_hot": (mos, make_label("one_hot", mos, None, detail))}
    if mos_with_std is not None:
        labels["gaussian_pdf"] = (mos_with_std, make_label("gaussian_pdf", mos_with_std, std, detail))
    centers = level_centers(detail)
    return [
        LeakRow(name, detail, share, float(np.mean(np.abs(restore(label * (1 - share), centers) - y))))
        for name, (y, label) in labels.items()
        for share in LEAKS
    ]


def _noise(opinions: Opinions, detail: int, seed: int) -> list[NoiseError]:
    """All formulations on the same images."""
    labels = ["one_hot", "linear", *(["gaussian_pdf", "gaussian_cdf"] if opinions.has_std else [])]
    mos, std = opinions.sample(NOISE_IMAGES, seed, only_with_std=opinions.has_std)
    found = []
    for noise in NOISES:
        found += [noisy_levels(name, mos, std, detail, noise, seed=seed) for name in labels]
        found.append(noisy_regression(mos, noise, seed=seed))
    return found
