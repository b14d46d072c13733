"""How well scores agree with human opinions: SRCC, PLCC, KRCC, RMSE, and PLCC after a logistic fit.

Pure functions of arrays. What is not defined (fewer than three images, one side constant) is None with a reason, never
a warning, a NaN or a made-up number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import leastsq
from scipy.special import expit
from scipy.stats import kendalltau, rankdata

from ..data.labels import Floats

MINIMUM_IMAGES = 3
FIT_EVALUATIONS = 10_000
CLEARLY_BETTER = 1e-6  # share of the variance; both starts often end in one curve, written in two ways


@dataclass(frozen=True)
class LogisticFit:
    """`bottom + (top - bottom) / (1 + exp(-(score - middle) / width))`, which maps scores to MOS.

    The 4-parameter curve of VQEG (Final report on the validation of objective models of video quality assessment,
    phase II, 2003), fitted by least squares.
    """

    top: float
    bottom: float
    middle: float
    width: float

    def __call__(self, scores: ArrayLike) -> Floats:
        """Predicted MOS of each score, same shape."""
        values = np.asarray(scores, np.float64)
        predicted: Floats = (self.top - self.bottom) * expit((values - self.middle) / self.width) + self.bottom
        return predicted


@dataclass(frozen=True)
class Correlations:
    """Agreement of N scores with N opinions. None where it is not defined; `problem` then says why.

    Attributes:
        images: N.
        srcc, plcc, krcc: Spearman, Pearson (of the raw scores), Kendall (tau-b).
        rmse: Of the raw scores; has a meaning only where scores and opinions are on one scale.
        fit: The logistic curve, None where it cannot be fitted; `fit_problem` then says why.
        plcc_fitted, rmse_fitted: Between the curve's values and the opinions.
    """

    images: int
    srcc: float | None = None
    plcc: float | None = None
    krcc: float | None = None
    rmse: float | None = None
    problem: str | None = None
    fit: LogisticFit | None = None
    plcc_fitted: float | None = None
    rmse_fitted: float | None = None
    fit_problem: str | None = None


def correlations(scores: ArrayLike, mos: ArrayLike, fit: bool = True) -> Correlations:
    """Agreement of scores with opinions, both higher = better.

    Args:
        scores: (N,) finite numbers.
        mos: (N,) finite numbers, any scale.
        fit: also fit the logistic curve.

    Raises:
        ValueError: other shapes, or a number that is not finite.

    >>> found = correlations([1, 2, 3, 4], [10, 20, 25, 24])
    >>> f"{found.srcc:.3f} {found.plcc:.3f} {found.krcc:.3f}"
    '0.800 0.886 0.667'
    >>> correlations([3, 3, 3], [1, 2, 3]).problem
    'all 3 scores are 3'
    """
    scores, mos = checked(scores, mos)
    error = _rmse(scores, mos) if len(scores) else None
    if problem := undefined(scores, mos):
        return Correlations(len(scores), rmse=error, problem=problem, fit_problem=problem)
    kendall = float(kendalltau(scores, mos).statistic)
    found = Correlations(len(scores), srcc(scores, mos), pearson(scores, mos), kendall, error)
    if not fit:
        return found
    curve = fit_logistic(scores, mos)
    if isinstance(curve, str):
        return replace(found, fit_problem=curve)
    fitted = curve(scores)
    return replace(found, fit=curve, plcc_fitted=pearson(fitted, mos), rmse_fitted=_rmse(fitted, mos))


def undefined(scores: Floats, mos: Floats) -> str | None:
    """Why no correlation of the two is defined; None if it is."""
    if len(scores) < MINIMUM_IMAGES:
        return f"{len(scores)} images: a correlation needs at least {MINIMUM_IMAGES}"
    if is_constant(scores):
        return f"all {len(scores)} scores are {scores[0]:g}"
    if is_constant(mos):
        return f"all {len(mos)} opinions are {mos[0]:g}"
    return None


def is_constant(values: Floats) -> bool:
    """Whether the values differ by no more than rounding."""
    mean = values.mean()
    return bool(np.linalg.norm(values - mean) <= 1e-13 * abs(mean))


def pearson(first: Floats, second: Floats) -> float:
    """Pearson correlation of two (N,) arrays that are not constant."""
    first, second = first - first.mean(), second - second.mean()
    # Scaled before they are multiplied, so that tiny and huge values neither vanish nor overflow.
    product = np.dot(first / np.linalg.norm(first), second / np.linalg.norm(second))
    return float(np.clip(product, -1.0, 1.0))


def srcc(scores: Floats, mos: Floats) -> float:
    """Spearman correlation of two (N,) arrays that are not constant."""
    return pearson(rankdata(scores), rankdata(mos))


def fit_logistic(scores: ArrayLike, mos: ArrayLike) -> LogisticFit | str:
    """Least-squares `LogisticFit` of (N,) scores to (N,) MOS, or why there is none.

    Starting point and number of evaluations are those of the published evaluation script: largest MOS, smallest MOS,
    mean score, a quarter of the scores' standard deviation; so it finds the same (local) optimum. That optimum can be a
    bad one where the relation falls, so the mirrored start (negative width) is tried as well and the better fit kept.
    """
    scores, mos = checked(scores, mos)
    if len(scores) < 4:
        return f"{len(scores)} images: a curve with 4 parameters needs at least 4"
    if is_constant(scores):
        return f"all {len(scores)} scores are {scores[0]:g}"

    def residuals(parameters: Floats) -> Floats:
        return LogisticFit(*parameters)(scores) - mos

    best: LogisticFit | None = None
    error, problem = np.inf, ""
    for width in (scores.std() / 4, -scores.std() / 4):
        start = np.array([mos.max(), mos.min(), scores.mean(), width])
        # A width of 0 or an overflow on the way is a step that the solver takes back; only its end counts.
        with np.errstate(all="ignore"):
            found, _, _, message, status = leastsq(residuals, start, maxfev=FIT_EVALUATIONS, full_output=True)
            curve = LogisticFit(*found.tolist())
            fitted = curve(scores)
        if status not in (1, 2, 3, 4):
            problem = problem or f"the fit does not converge: {' '.join(message.split())}"
        elif not np.isfinite(fitted).all() or is_constant(fitted):
            problem = problem or "the fit ends in a constant"
        elif (squared := float(np.sum((fitted - mos) ** 2))) < error - CLEARLY_BETTER * len(mos) * mos.var():
            best, error = curve, squared
    return best or problem


def _rmse(first: Floats, second: Floats) -> float:
    return float(np.sqrt(np.mean((first - second) ** 2)))


def checked(scores: ArrayLike, mos: ArrayLike) -> tuple[Floats, Floats]:
    """Both as (N,) float64 arrays. Raises `ValueError`: other or unlike shapes, numbers that are not finite."""
    arrays = []
    for name, values in (("scores", scores), ("mos", mos)):
        array = np.asarray(values, np.float64)
        if array.ndim != 1:
            raise ValueError(f"{name} must have shape (N,), not {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, but {int((~np.isfinite(array)).sum())} are not: leave them out")
        arrays.append(array)
    if arrays[0].shape != arrays[1].shape:
        raise ValueError(f"scores and mos must be of one length, not {len(arrays[0])} and {len(arrays[1])}")
    return arrays[0], arrays[1]
