"""What noise in the numbers that a network emits does to each formulation: simulated, and to second order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import softmax

from ..data.labels import Floats, level_centers
from ..evaluation.correlation import correlations
from .conversion_error import make_label

CERTAINTY = 0.99


@dataclass(frozen=True)
class NoiseError:
    """Error of a formulation whose network emits its numbers with normal noise of standard deviation `noise`.

    Attributes:
        rmse, mae, srcc: simulated, against the MOS; `srcc` None where one side is constant.
        mse_standard_error: of the simulated squared error.
        analytic_rmse: `small_noise_error` for levels, exact for the regression.
    """

    formulation: str
    noise: float
    rmse: float
    mae: float
    srcc: float | None
    mse_standard_error: float
    analytic_rmse: float


def certain_logits(label: Floats) -> Floats:
    """Logits whose softmax is the label (N, K), rows >= 0 with a positive sum, as far as logits can be finite.

    Each row is divided by its sum and mixed with a uniform share of 1 - `CERTAINTY`, for a one-hot label would need an
    infinite logit. The mixture alone draws the restored score to the middle: the error without noise shows it.
    """
    share = label / label.sum(axis=1, keepdims=True)
    return np.log(CERTAINTY * share + (1 - CERTAINTY) / label.shape[1])


def small_noise_error(logits: Floats, values: Floats, mos: Floats, noise: float) -> float:
    """Mean squared error of softmax(logits + noise) restored with `values`, to second order in the noise.

    The restored score f = sum_i p_i v_i has the derivatives df/dz_i = p_i (v_i - f) and
    d2f/dz_i2 = p_i (1 - 2 p_i) (v_i - f), so that independent noise of variance s^2 on every logit gives

        E (f - y)^2 = (f - y + s^2/2 sum_i p_i (1 - 2 p_i)(v_i - f))^2 + s^2 sum_i p_i^2 (v_i - f)^2.

    Shapes: logits (N, K), values (K,), mos (N,).
    """
    p = softmax(logits, axis=-1)
    restored = p @ values
    lever = values - restored[:, None]
    shift = noise**2 / 2 * np.sum(p * (1 - 2 * p) * lever, axis=1)
    return float(np.mean((restored + shift - mos) ** 2 + noise**2 * np.sum((p * lever) ** 2, axis=1)))


def noisy_levels(
    name: str, mos: ArrayLike, std: ArrayLike | None, levels: int, noise: float, draws: int = 8, seed: int = 0
) -> NoiseError:
    """A network that knows every label, read through logits with independent noise; `integers` values.

    Arguments as for `make_label`; `noise` is the standard deviation on each of the K logits, `draws` >= 2 the noisy
    readings per image.
    """
    y, values = np.asarray(mos, dtype=np.float64), level_centers(levels)
    logits = certain_logits(make_label(name, y, std, levels))
    draw = noise * np.random.default_rng(seed).standard_normal((draws, *logits.shape))
    analytic = math.sqrt(small_noise_error(logits, values, y, noise))
    return _noise_error(name, noise, softmax(logits + draw, axis=-1) @ values, y, analytic)


def noisy_regression(mos: ArrayLike, noise: float, draws: int = 8, seed: int = 0) -> NoiseError:
    """A regressor that knows every MOS, with noise on its one output: E eps^2 = noise^2."""
    y = np.asarray(mos, dtype=np.float64)
    restored = y + noise * np.random.default_rng(seed).standard_normal((draws, len(y)))
    return _noise_error("score_token", noise, restored, y, noise)


def _noise_error(formulation: str, noise: float, restored: Floats, mos: Floats, analytic: float) -> NoiseError:
    """Statistics of (draws, N) restored scores; the standard error is that of the noise, the images being given."""
    squared = (restored - mos) ** 2
    return NoiseError(
        formulation=formulation,
        noise=noise,
        rmse=math.sqrt(float(np.mean(squared))),
        mae=float(np.mean(np.abs(restored - mos))),
        srcc=correlations(restored[0], mos, fit=False).srcc,
        mse_standard_error=math.sqrt(float(np.mean(np.var(squared, axis=0, ddof=1))) / squared.size),
        analytic_rmse=analytic,
    )
