"""Conversion errors of all formulations on one dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.labels import Floats, level_centers, level_index, restore
from ..data.opinions import Opinions
from .ceilings import best_possible, correlations, one_hot_ceilings
from .conversion_error import (
    HIGH,
    LOW,
    SIGNIFICANT_BITS,
    WITH_STD,
    Values,
    leak,
    level_values,
    make_label,
    named_score,
    round_to,
)
from .error_rows import ErrorRow, ErrorSums
from .simulation import NoiseError, UniformCheck, check_uniform, noisy_levels, noisy_regression

Counts = NDArray[np.int64]

SAMPLE = 50_000
"""Images that labels other than one-hot are made of; one-hot figures come from every image of a larger dataset too."""
TIE_GRID = 1 << 20  # MOS that differ by less than 4e-6 count as equal
NOISE_IMAGES = 2000
NOISES = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
LEAKS = (0.0, 0.01, 0.05, 0.1)
ONE_HOT_VALUES: tuple[Values, ...] = ("integers", "interval_centers", "optimal")
SOFT_VALUES: tuple[Values, ...] = ("integers", "optimal")


@dataclass(frozen=True)
class LeakRow:
    """Mean absolute error where `share` of the mass goes to words that are no level, summed over the open set."""

    label: str
    levels: int
    share: float
    mae: float


@dataclass(frozen=True)
class Study:
    """All that `study` finds.

    Attributes:
        opinions: the dataset.
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
    uniform: list[UniformCheck]
    leaks: list[LeakRow]
    noise: list[NoiseError]
    histogram: Counts
    bounds: dict[int, tuple[float, float]]
    level_shares: Floats
    soft_shares: dict[str, Floats]
    level_values: Floats
    sample: tuple[Floats, Floats]

    def row(self, label: str, values: str, levels: int | None) -> ErrorRow | None:
        """The row of a formulation, None where the dataset has no spreads for it."""
        found = [row for row in self.rows if (row.label, row.values, row.levels) == (label, values, levels)]
        return found[0] if found else None


def study(opinions: Opinions, levels: Sequence[int] = range(2, 21), detail: int = 5, seed: int = 0) -> Study:
    """Measure every formulation for every number of levels.

    Args:
        opinions: the dataset; Gaussian labels need spreads.
        levels: numbers of levels, each at least 2.
        detail: number of levels that leaks, noise and pictures are computed for; added to `levels`.
        seed: of samples and simulations.

    Raises:
        ValueError: a number of levels below 2.
    """
    wanted = sorted({*levels, detail})
    if wanted[0] < 2:
        raise ValueError(f"levels must be at least 2, got {wanted[0]}: one level tells nothing")
    ties, counts, values = _level_statistics(opinions, wanted)
    rows = _one_hot_rows(opinions, wanted, counts, values, ties)
    mos, std = opinions.sample(SAMPLE, seed)
    mos_with_std, only_std = opinions.sample(SAMPLE, seed, only_with_std=True)
    for count in wanted:
        rows += _soft_rows("linear", mos, None, count, len(mos) == opinions.images)
        if opinions.has_std:
            whole = len(only_std) == opinions.images - opinions.missing_std
            rows += [row for name in WITH_STD for row in _soft_rows(name, mos_with_std, only_std, count, whole)]
    for dtype in SIGNIFICANT_BITS:
        rows.append(_row("score_token", dtype, None, mos, mos, round_to(mos, dtype), len(mos) == opinions.images))
    soft = {
        name: label.mean(axis=0) / label.mean(axis=0).sum()
        for name in WITH_STD
        if opinions.has_std and not name.endswith("normalised")
        for label in [make_label(name, mos_with_std, only_std, detail)]
    }
    return Study(
        opinions=opinions,
        detail=detail,
        rows=rows,
        uniform=[
            check_uniform(count, kind, seed=seed) for count in wanted for kind in ("integers", "interval_centers")
        ],
        leaks=_leaks(mos, mos_with_std if opinions.has_std else None, only_std, detail),
        noise=_noise(opinions, detail, seed),
        histogram=np.add.reduceat(ties, np.arange(64) * (TIE_GRID // 64)),
        bounds={count: best_possible(count, ties) for count in wanted},
        level_shares=counts[detail] / opinions.images,
        soft_shares=soft,
        level_values=values[detail],
        sample=(mos, std),
    )


def _level_statistics(opinions: Opinions, wanted: Sequence[int]) -> tuple[Counts, dict[int, Counts], dict[int, Floats]]:
    """One pass: images per distinct MOS, and, by number of levels, images per level and their mean MOS."""
    ties = np.zeros(TIE_GRID + 1, dtype=np.int64)
    counts = {count: np.zeros(count, dtype=np.int64) for count in wanted}
    sums = {count: np.zeros(count) for count in wanted}
    for mos, _ in opinions.chunks():
        grid = np.rint((mos - LOW) / (HIGH - LOW) * TIE_GRID).astype(np.int64)
        ties += np.bincount(np.clip(grid, 0, TIE_GRID), minlength=TIE_GRID + 1)
        for count in wanted:
            index = level_index(mos, count)
            counts[count] += np.bincount(index, minlength=count)
            sums[count] += np.bincount(index, weights=mos, minlength=count)
    middles = {count: level_centers(count, kind="interval_centers") for count in wanted}
    # A level without images keeps the middle of its interval.
    means = {k: np.divide(sums[k], counts[k], out=middles[k].copy(), where=counts[k] > 0) for k in wanted}
    return ties, counts, means


def _one_hot_rows(
    opinions: Opinions, wanted: Sequence[int], counts: dict[int, Counts], optimal: dict[int, Floats], ties: Counts
) -> list[ErrorRow]:
    """A second pass, over every image."""
    middles = {count: level_centers(count, kind="interval_centers") for count in wanted}
    values = {
        (count, kind): optimal[count] if kind == "optimal" else level_centers(count, kind=kind)
        for count in wanted
        for kind in ONE_HOT_VALUES
    }
    sums = {key: ErrorSums() for key in values}
    for mos, _ in opinions.chunks():
        for count in wanted:
            index = level_index(mos, count)
            named = middles[count][index]
            for kind in ONE_HOT_VALUES:
                sums[count, kind].add(mos, named, values[count, kind][index])
    rows = []
    for (count, kind), total in sums.items():
        srcc, krcc = one_hot_ceilings(counts[count], ties)
        rows.append(total.row("one_hot", kind, count, srcc, krcc, whole=True))
    return rows


def _soft_rows(name: str, mos: Floats, std: Floats | None, levels: int, whole: bool) -> list[ErrorRow]:
    label = make_label(name, mos, std, levels)
    named = named_score(name, label)
    return [
        _row(name, kind, levels, mos, named, restore(label, level_values(kind, label, mos)), whole)
        for kind in (("integers",) if name == "linear" else SOFT_VALUES)
    ]


def _row(
    label: str, values: str, levels: int | None, mos: Floats, named: Floats, restored: Floats, whole: bool
) -> ErrorRow:
    sums = ErrorSums()
    sums.add(mos, named, restored)
    srcc, _, krcc = correlations(restored, mos)
    return sums.row(label, values, levels, srcc, krcc, whole)


def _leaks(mos: Floats, mos_with_std: Floats | None, std: Floats, detail: int) -> list[LeakRow]:
    labels = {"one_hot": (mos, make_label("one_hot", mos, None, detail))}
    if mos_with_std is not None:
        labels["gaussian_pdf"] = (mos_with_std, make_label("gaussian_pdf", mos_with_std, std, detail))
    centers = level_centers(detail)
    return [
        LeakRow(name, detail, share, float(np.mean(np.abs(restore(leak(label, share), centers) - y))))
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
