"""From full-reference metrics to opinions: a monotone fit to what people said of KADID-10k's distortions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import optimize, stats

REFERENCE_METRICS = ("gmsd", "psnry")
"""Names in pyiqa of the metrics that a calibration reads; none needs a download.

`vsi` and `nlpd` were tried beside them: the fit gave both a weight of zero.
"""

CALIBRATION_TYPES = (1, 2, 3, 6, 9, 10, 11, 12, 13, 14, 15, 19, 21, 24)
"""KADID types that resemble what happens in realistic chains: blur, codecs, noise, denoising, resampling, sharpening.

Changes of tone and colour and local damage are left out: people judge those by other rules.
"""

BEST_OPINION = 4.65
"""Opinion of an undistorted photo; the best cells of KADID-10k lie at 4.60 to 4.61."""


def distances(values: Mapping[str, float | np.ndarray]) -> np.ndarray:
    """(..., 2) distances from the reference, larger is worse, on scales where opinions are nearly linear.

    log(gmsd) and -psnry / 10; a floor and a ceiling keep equal pictures finite.
    """
    gmsd, psnry = (np.asarray(values[name], dtype=np.float64) for name in REFERENCE_METRICS)
    return np.stack([np.log(np.maximum(gmsd, 1e-3)), -np.minimum(psnry, 60.0) / 10], axis=-1)


@dataclass(frozen=True)
class Calibration:
    """opinion = 1 + (best - 1) * sigmoid(bias - weights . distances), weights >= 0, so that worse is never better.

    `fit` says how well it fits: `srcc`, `plcc`, `rmse` over the cells (type, level), and over single pictures.
    """

    weights: tuple[float, ...]
    bias: float
    fit: dict[str, float] = field(default_factory=dict)

    def opinion(self, values: Mapping[str, float | np.ndarray]) -> np.ndarray:
        """Opinion 1..`BEST_OPINION` for values of `REFERENCE_METRICS`."""
        return _opinion(np.array([*self.weights, self.bias]), distances(values))


def _opinion(parameters: np.ndarray, of: np.ndarray) -> np.ndarray:
    return 1 + (BEST_OPINION - 1) / (1 + np.exp(of @ parameters[:-1] - parameters[-1]))


def fit_calibration(values: Sequence[Mapping[str, float]], opinions: Sequence[float]) -> Calibration:
    """Least squares over pictures, each with the human mean of its cell.

    Args:
        values: of `REFERENCE_METRICS`, one mapping per picture.
        opinions: 1..5, the same length. Pictures of one cell share theirs.

    Raises:
        ValueError: fewer than 20 pictures, or another number of opinions.
    """
    if len(values) != len(opinions) or len(values) < 20:
        raise ValueError(f"values and opinions must be of 20 pictures or more, got {len(values)} and {len(opinions)}")
    of = distances({name: np.array([value[name] for value in values]) for name in REFERENCE_METRICS})
    target = np.asarray(opinions, dtype=np.float64)
    start = np.array([0.5] * of.shape[-1] + [-3.0])
    low = np.array([0.0] * of.shape[-1] + [-np.inf])
    solved = optimize.least_squares(lambda p: _opinion(p, of) - target, start, bounds=(low, np.inf))
    predicted = _opinion(solved.x, of)
    cells = np.unique(target)
    means = np.array([predicted[target == cell].mean() for cell in cells])
    fit = {f"{name} over cells": value for name, value in _agreement(means, cells).items()}
    fit |= {f"{name} over pictures": value for name, value in _agreement(predicted, target).items()}
    return Calibration(tuple(float(weight) for weight in solved.x[:-1]), float(solved.x[-1]), fit)


def _agreement(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    return {
        "srcc": float(stats.spearmanr(predicted, target).statistic),
        "plcc": float(stats.pearsonr(predicted, target).statistic),
        "rmse": float(np.sqrt(np.mean((predicted - target) ** 2))),
    }
