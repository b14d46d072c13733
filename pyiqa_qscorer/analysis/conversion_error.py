"""Errors of MOS -> label -> MOS, as pure functions.

A label over K levels is made of a MOS y (label approximation) and read back as `restored` (restoration). What is
lost, eps = restored - y, is the conversion error; even a network that predicts every label perfectly keeps it.
`data/labels.py` makes the labels, this module measures them. Scores lie on 1 (worst) .. 5 (best); arrays are float64,
one row per image.

    [1] Q-Align, Wu et al., ICML 2024.
    [2] DeQA-Score, You et al., CVPR 2025.
    [3] Q-Scorer, "Revisiting MLLM Based Image Quality Assessment: Errors and Remedy", AAAI 2026.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from ..data.labels import Floats, gaussian_soft_label, level_centers, linear_soft_label, one_hot, restore
from ..data.opinions import HIGH, LOW
from ..evaluation.correlation import correlations

_gaussian_pdf, _gaussian_cdf = (partial(gaussian_soft_label, variant=variant) for variant in ("pdf", "cdf"))

WITHOUT_STD: dict[str, Callable[[ArrayLike, int], Floats]] = {"one_hot": one_hot, "linear": linear_soft_label}
WITH_STD: dict[str, Callable[[ArrayLike, ArrayLike, int], Floats]] = {
    "gaussian_pdf_raw": partial(_gaussian_pdf, adjust=False),
    "gaussian_pdf": _gaussian_pdf,
    "gaussian_pdf_normalised": partial(_gaussian_pdf, normalise=True),
    "gaussian_cdf_raw": partial(_gaussian_cdf, adjust=False),
    "gaussian_cdf": _gaussian_cdf,
    "gaussian_cdf_normalised": partial(_gaussian_cdf, normalise=True),
}
LABELS = (*WITHOUT_STD, *WITH_STD)
"""Label approximations: one-hot of [1]; linear interpolation; Gaussian of [2]: raw, with post-adjustment, and with the
adjusted row divided by its sum, which is what a softmax can learn of it."""

SIGNIFICANT_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}
"""Bits of a number's significand, the hidden one included. A score from 1 to 5 is a normal number in all three."""


def make_label(name: str, mos: ArrayLike, std: ArrayLike | None, levels: int) -> Floats:
    """Label (N, K) of MOS on 1..5 by the name of its kind, one of `LABELS`; the Gaussian ones need `std`. Both (N,).

    Raises:
        ValueError: another name, a Gaussian label without `std`; besides, as `pyiqa_qscorer.data.labels`.
    """
    if name in WITHOUT_STD:
        return WITHOUT_STD[name](mos, levels)
    if name not in WITH_STD:
        raise ValueError(f"name must be one of {', '.join(LABELS)}, got {name!r}")
    if std is None:
        raise ValueError(f"label {name} is made of the spread of opinions: give std, or take 'linear'")
    return WITH_STD[name](mos, std, levels)


def named_score(name: str, label: Floats) -> Floats:
    """The scores (N,) that labels (N, K) name, before any choice of restoration: where label approximation ends.

    A one-hot level names the middle of its interval; a soft label, divided by its sum, the mean of its distribution
    over the `integers` values. A row of zeros (a raw density so narrow that it is 0 at every centre) names nothing:
    the middle of the scale then stands for it.
    """
    levels = label.shape[1]
    if name == "one_hot":
        return restore(label, level_centers(levels, kind="interval_centers"))
    centers, total = level_centers(levels), label.sum(axis=1)
    return np.divide(restore(label, centers), total, out=np.full(len(label), centers.mean()), where=total > 0)


def optimal_values(label: Floats, mos: ArrayLike) -> Floats:
    """Values (K,) of the levels with the least squared error on the dataset of these labels (N, K) and MOS (N,).

    They are argmin over v of E (sum_i p_i v_i - y)^2, in closed form v = E[p p^T]^-1 E[p y]. For one-hot labels v_i is
    the mean MOS of level i. A level that no image uses (more generally, what the data leave open) keeps its integer,
    for one-hot labels the centre of its interval.
    """
    is_one_hot = bool((label.max(axis=1) == 1.0).all())
    values = level_centers(label.shape[1], kind="interval_centers" if is_one_hot else "integers")
    gram, gap = label.T @ label, label.T @ (np.asarray(mos, dtype=np.float64) - label @ values)
    # Least norm of the step, so that directions without data stay where they start.
    return values + np.linalg.lstsq(gram, gap, rcond=1e-12)[0]


@dataclass(frozen=True)
class ErrorAgainstMos:
    """Error score - MOS of N scores on the 1..5 scale; correlations are None where one side is constant."""

    mae: float
    rmse: float
    bias: float
    srcc: float | None
    plcc: float | None
    krcc: float | None


def error_against(scores: Floats, mos: Floats, decimals: int | None = None) -> ErrorAgainstMos:
    """Statistics of (N,) scores with (N,) MOS.

    Args:
        decimals: correlate numbers rounded to so many, so that scores which are equal but for rounding are ties.
    """
    error = scores - mos
    pair = (scores, mos) if decimals is None else (np.round(scores, decimals), np.round(mos, decimals))
    found = correlations(*pair, fit=False)
    mae, rmse, bias = float(np.mean(np.abs(error))), math.sqrt(float(np.mean(error**2))), float(np.mean(error))
    return ErrorAgainstMos(mae, rmse, bias, found.srcc, found.plcc, found.krcc)


@dataclass(frozen=True)
class ErrorParts:
    """E[eps^2] = label part + restoration part + cross term, for eps = (named - y) + (restored - named).

    Attributes:
        mse: E[eps^2].
        label_part: E[(named - y)^2], what the label forgets of the MOS.
        restoration_part: E[(restored - named)^2], what reading it back adds.
        cross_term: 2 E[(named - y)(restored - named)]; 0 where `named` is the mean MOS of each label.
    """

    mse: float
    label_part: float
    restoration_part: float
    cross_term: float


def decompose(mos: ArrayLike, named: ArrayLike, restored: ArrayLike) -> ErrorParts:
    """Parts of the mean squared conversion error of N images, as [3] splits it. All arguments (N,)."""
    y, middle, end = (np.asarray(x, dtype=np.float64) for x in (mos, named, restored))
    first, second = middle - y, end - middle
    return ErrorParts(
        float(np.mean((end - y) ** 2)),
        float(np.mean(first**2)),
        float(np.mean(second**2)),
        float(2 * np.mean(first * second)),
    )


def uniform_errors(values: ArrayLike) -> tuple[float, float]:
    """Expected squared and absolute error of one-hot levels restored as `values`, for a MOS uniform on 1..5.

    With intervals of width d = 4 / K, middles m_i and b_i = v_i - m_i:

        E eps^2 = d^2 / 12 + mean_i b_i^2
        E |eps| = mean_i (d / 4 + b_i^2 / d where |b_i| <= d / 2, else |b_i|)

    >>> [round(error, 4) for error in uniform_errors([1, 2, 3, 4, 5])]
    [0.1333, 0.3]
    """
    restored = np.asarray(values, dtype=np.float64)
    width = (HIGH - LOW) / len(restored)
    bias = np.abs(restored - level_centers(len(restored), kind="interval_centers"))
    absolute = np.where(bias <= width / 2, width / 4 + bias**2 / width, bias)
    return float(width**2 / 12 + np.mean(bias**2)), float(np.mean(absolute))


def best_possible(levels: int, tie_counts: ArrayLike | None = None) -> tuple[float, float]:
    """SRCC and KRCC with the MOS that no split into K levels exceeds, ties included; at most 1.

    The formulas of README.md, "Ranks", for equally filled levels, which make both largest (power means). They are the
    algebra of mid-ranks (M. G. Kendall, Rank Correlation Methods); in tau-b, pairs of one level are tied, all others
    concordant.

    Args:
        levels: K >= 1.
        tie_counts: images per distinct MOS, any length; None: a continuous MOS.
    """
    ties = np.zeros(1) if tie_counts is None else np.asarray(tie_counts, dtype=np.float64)
    shares = ties / max(float(ties.sum()), 1.0)
    srcc, krcc = (
        min(1.0, math.sqrt((1.0 - levels ** (1.0 - power)) / max(1.0 - float(np.sum(shares**power)), 1e-15)))
        for power in (3, 2)
    )
    return srcc, krcc


def round_to(scores: ArrayLike, dtype: str) -> Floats:
    """Scores as a number format holds them (nearest, ties to even): all that score token + regression can lose.

    Args:
        scores: any shape; normal numbers of the format.
        dtype: one of `SIGNIFICANT_BITS`, else `ValueError`.
    """
    if dtype not in SIGNIFICANT_BITS:
        raise ValueError(f"dtype must be one of {', '.join(SIGNIFICANT_BITS)}, got {dtype!r}")
    fraction, exponent = np.frexp(np.asarray(scores, dtype=np.float64))
    scale = 2.0 ** SIGNIFICANT_BITS[dtype]
    return np.ldexp(np.rint(fraction * scale) / scale, exponent)


def uniform_rounding_errors(dtype: str) -> tuple[float, float]:
    """Expected squared and absolute rounding error of a score uniform on 1..5.

    Between two powers of two numbers are equally spaced by s = 2^(e + 1 - bits): s^2 / 12 and s / 4 there.
    """
    bits, squared, absolute = SIGNIFICANT_BITS[dtype], 0.0, 0.0
    for exponent in (0, 1, 2):  # 1..2, 2..4, and the first quarter of 4..8
        share = (min(HIGH, 2.0 ** (exponent + 1)) - 2.0**exponent) / (HIGH - LOW)
        spacing = 2.0 ** (exponent + 1 - bits)
        squared += share * spacing**2 / 12
        absolute += share * spacing / 4
    return squared, absolute
