"""Best correlations with the MOS that a label leaves possible, ties included.

A level holds many MOS. Whatever is restored from the level is one number for all of them, so their order is lost. With
n_k of N images in level k, and t_j images in each group of equal MOS, the algebra of mid-ranks gives the ceilings in
closed form: the ranks of the levels are the mean ranks of the MOS in them, and no function of the level correlates
better with those ranks (Cauchy-Schwarz).

    SRCC^2 = (N^3 - sum n_k^3) / (N^3 - sum t_j^3)
    KRCC^2 = (N^2 - sum n_k^2) / (N^2 - sum t_j^2)         tau-b: pairs in one level are tied, all others concordant

Of all ways to fill K levels the equal one is the best (power means), which bounds every split: for a continuous MOS by
SRCC = sqrt(1 - 1/K^2) and KRCC = sqrt(1 - 1/K).

References: M. G. Kendall, Rank Correlation Methods (mid-ranks, tau-b); Q-Scorer, AAAI 2026 (the error behind it).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ..data.labels import Floats

_DECIMALS = 9  # scores nearer than this are equal but for rounding, e.g. of one level restored in two rows


def one_hot_ceilings(level_counts: ArrayLike, tie_counts: ArrayLike) -> tuple[float, float]:
    """SRCC and KRCC of the level against the MOS, for levels that follow the order of the MOS.

    Args:
        level_counts: (K,) images per level.
        tie_counts: images per distinct MOS, any length; zeros do no harm. Same sum.

    Returns:
        NaN where either side is constant.

    Raises:
        ValueError: sums that differ, or no images.
    """
    levels, ties = np.asarray(level_counts, dtype=np.float64), np.asarray(tie_counts, dtype=np.float64)
    total = levels.sum()
    if total != ties.sum() or total == 0:
        raise ValueError(
            f"level_counts and tie_counts must count the same images, got {total:.0f} and {ties.sum():.0f}"
        )
    found = []
    for power in (3, 2):
        # As shares, so that the powers stay small.
        kept, whole = (1.0 - float(np.sum((counts / total) ** power)) for counts in (levels, ties))
        found.append(math.sqrt(max(kept, 0.0) / whole) if kept > 1e-15 and whole > 1e-15 else math.nan)
    return found[0], found[1]


def best_possible(levels: int, tie_counts: ArrayLike | None = None) -> tuple[float, float]:
    """SRCC and KRCC of K equally filled levels, which no split into K levels exceeds; at most 1.

    Args:
        levels: K >= 1.
        tie_counts: as in `one_hot_ceilings`; None: a continuous MOS.
    """
    ties = np.zeros(1) if tie_counts is None else np.asarray(tie_counts, dtype=np.float64)
    shares = ties / max(float(ties.sum()), 1.0)
    srcc, krcc = (
        min(1.0, math.sqrt((1.0 - levels ** (1.0 - power)) / max(1.0 - float(np.sum(shares**power)), 1e-15)))
        for power in (3, 2)
    )
    return srcc, krcc


def correlations(restored: Floats, mos: Floats) -> tuple[float, float, float]:
    """SRCC, PLCC and KRCC (tau-b) of (N,) scores; NaN where a side is constant or there are fewer than two images."""
    restored, mos = np.round(restored, _DECIMALS), np.round(mos, _DECIMALS)
    if len(mos) < 2 or np.ptp(restored) == 0 or np.ptp(mos) == 0:
        return math.nan, math.nan, math.nan
    return (
        float(stats.spearmanr(restored, mos).statistic),
        float(stats.pearsonr(restored, mos).statistic),
        float(stats.kendalltau(restored, mos).statistic),
    )
