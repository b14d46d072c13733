"""MOS -> label over K levels (label approximation) and back (restoration).

Shared by training, which needs the labels, and by the error analysis, which measures what they cost. A MOS lies on
1 (worst) .. 5 (best); level 0 is the worst. Everything is a function of float64 arrays, one row per image.

    [1] Q-Align, Wu et al., ICML 2024: one-hot label of an equal split, restored with equally spaced values.
    [2] DeQA-Score, You et al., CVPR 2025: soft label from the distribution of opinions, with a linear post-adjustment.
        Details that the paper leaves open follow its label script (`build_soft_labels/gen_soft_label.py`).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

Centers = Literal["integers", "interval_centers"]
Variant = Literal["pdf", "cdf"]
Floats = NDArray[np.float64]
LOW, HIGH = 1.0, 5.0

# Share of the range by which a MOS may miss a border: covers float32 rounding, and the same slack of the data loader.
_SLACK = 2e-6


def level_centers(levels: int, kind: Centers = "integers") -> Floats:
    """(K,) values that the levels stand for in restoration, ascending.

    `integers` are those of [1] and [2]: equally spaced from 1 to 5 (one level: 3). `interval_centers` are the middles
    of the K intervals of `level_index`.

    Raises:
        ValueError: fewer than one level, another kind.
    """
    _check_levels(levels)
    if kind not in get_args(Centers):
        raise ValueError(f"kind must be one of {', '.join(get_args(Centers))}, got {kind!r}")
    if kind == "interval_centers" or levels == 1:
        return LOW + (np.arange(levels) + 0.5) * (HIGH - LOW) / levels
    return np.linspace(LOW, HIGH, levels)


def level_index(mos: ArrayLike, levels: int) -> NDArray[np.int64]:
    """Level of the one-hot label: the range split into K equal intervals, each closed on the right, as in [1].

    Level i holds 1 + i d < mos <= 1 + (i + 1) d with d = 4 / K; 1 itself is in level 0. A MOS less than 2e-6 of the
    range above a border counts as on it, so that rounding does not move it up a level.

    Args:
        mos: (N,), within [1, 5].

    Returns:
        (N,) of 0..K-1.

    Raises:
        ValueError: a MOS that is not finite or outside the range, fewer than one level.
    """
    _check_levels(levels)
    position = (_check_mos(mos) - LOW) / (HIGH - LOW) - _SLACK
    return np.clip(np.ceil(position * levels) - 1, 0, levels - 1).astype(np.int64)


def one_hot(mos: ArrayLike, levels: int) -> Floats:
    """One-hot label of [1]: (N, K), 1 at `level_index`. Arguments and errors are those of `level_index`."""
    index = level_index(mos, levels)
    return np.eye(levels)[index]


def linear_soft_label(mos: ArrayLike, levels: int) -> Floats:
    """The two levels around a MOS, weighted so that `restore` with the `integers` centres gives it back exactly.

    p_i = max(0, 1 - |mos - c_i| / s), s the distance between centres. [2] uses it where the Gaussian label fails.
    One level: all 1, and nothing can be restored.

    Returns:
        (N, K), each row >= 0 with sum 1. Arguments and errors are those of `level_index`.
    """
    _check_levels(levels)
    values = _check_mos(mos)
    label = np.zeros((len(values), levels))
    if levels == 1:
        return label + 1.0
    position = (values - LOW) / (HIGH - LOW) * (levels - 1)
    below = np.minimum(np.floor(position), levels - 2).astype(np.int64)
    rows = np.arange(len(values))
    label[rows, below + 1] = position - below
    label[rows, below] = 1.0 - label[rows, below + 1]
    return label


def gaussian_soft_label(
    mos: ArrayLike,
    std: ArrayLike,
    levels: int,
    variant: Variant = "pdf",
    adjust: bool = True,
    normalise: bool = False,
    min_std: float = 0.2,
    max_error: float = 0.1,
) -> Floats:
    """Soft label of [2]: the opinions' normal distribution N(mos, std) read at the `integers` centres c_i.

    Raw label, with s the distance between centres (1 for five levels):

        pdf: p_i = s * density of N(mos, std) at c_i;     cdf: p_i = mass of N(mos, std) in [c_i - s/2, c_i + s/2].

    It neither sums to 1 nor restores the MOS. The post-adjustment p_i' = a p_i + b makes it do both. With the centres'
    mean m, the two conditions sum p' = 1 and sum c p' = mos solve to

        a = (mos - m) / sum_i (c_i - m) p_i,     b = (1 - a sum_i p_i) / K.

    Entries below 0 are then set to 0 **without** making the sum 1 again, as the label script of [2] does. On KonIQ-10k
    this happens to 7 of 10 images, sums reach 1.09, and it is all that remains of the error: 0.008 on average. A
    softmax that is trained on such a row can only learn the row divided by its sum, of error 0.014: `normalise` shows
    that. A row becomes `linear_soft_label` where its std is below `min_std` or its error after clipping above
    `max_error`, the rule and the numbers of [2]; on KonIQ-10k 83 rows of 10073, which brings the error to 0.007.

    Where the script of [2] ends up with a uniform label, at mos = m, where a is 0 / 0, this takes the limit of a.

    Args:
        mos: (N,), within [1, 5].
        std: (N,), spread of single opinions (not of their mean), on the scale of `mos`.
        variant: [2] takes `pdf` for widely spread opinions (KonIQ-10k, KADID-10k), `cdf` for narrow ones (SPAQ).
        adjust: post-adjustment with its fallback; False: the raw label.
        normalise: divide each row by its sum at the end.
        min_std, max_error: limits of the fallback, in units of s. A std of 0 always falls back.

    Returns:
        (N, K), >= 0. A std of 0 (less than 1e-6 s) gives `linear_soft_label`; without `adjust` the limit of `cdf`:
        1 at the nearest centre, half and half between two. One level: all 1 with `adjust`.

    Raises:
        ValueError: std negative, not finite, or of another length than `mos`; besides, as `level_index`.
    """
    _check_levels(levels)
    values = _check_mos(mos)
    spread = _check_std(std, len(values))
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}")
    centers = level_centers(levels)
    step = (HIGH - LOW) / max(levels - 1, 1)
    exact = spread < 1e-6 * step
    sigma = np.where(exact, step, spread)  # any number that does no harm; these rows are replaced
    raw, slope = _raw_label(values, sigma, centers, step, variant)
    nearest = _nearest_label(values, centers, step)
    if not adjust:
        label = np.where(exact[:, None], nearest, raw)
    elif levels == 1:
        label = np.ones((len(values), 1))
    else:
        label = np.maximum(_adjusted(raw, slope, values, centers, step), 0.0)
        with np.errstate(invalid="ignore"):
            error = np.abs(restore(label, centers) - values)
        # `not <=` rather than `>`: a label that overflowed compares False to everything and must fall back too.
        falls_back = exact | (spread < min_std * step) | ~(error <= max_error * step)
        label = np.where(falls_back[:, None], linear_soft_label(values, levels), label)
    if normalise:
        total = label.sum(axis=1, keepdims=True)
        # A density so narrow that it is 0 at every centre: its limit.
        label = np.divide(label, total, out=nearest, where=total > 0)
    return label


def restore(probabilities: ArrayLike, centers: ArrayLike) -> Floats:
    """Score (...) of a label or of predicted level probabilities (..., K): sum_i p_i c_i, as in [1] and [2].

    The probabilities are taken as they are; whether they sum to 1 (softmax over the levels, or over the vocabulary
    with mass on other tokens) is the caller's choice.
    """
    weights: Floats = np.asarray(probabilities, dtype=np.float64)
    return weights @ np.asarray(centers, dtype=np.float64)


def _raw_label(mos: Floats, std: Floats, centers: Floats, step: float, variant: Variant) -> tuple[Floats, Floats]:
    """Raw Gaussian label (N, K) and its derivative by the MOS."""
    mos, std = mos[:, None], std[:, None]
    if variant == "pdf":
        label = step * _density((centers - mos) / std) / std
        return label, label * (centers - mos) / std**2
    left, right = (centers - step / 2 - mos) / std, (centers + step / 2 - mos) / std
    return ndtr(right) - ndtr(left), (_density(left) - _density(right)) / std


def _adjusted(raw: Floats, slope: Floats, mos: Floats, centers: Floats, step: float) -> Floats:
    """a p + b with sum 1 and expectation `mos`; not finite where no such a and b exist."""
    middle = centers.mean()
    offset = mos - middle
    at_middle = np.abs(offset) < 1e-7 * step  # both sides of the fraction vanish: take their derivatives instead
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = np.where(at_middle, 1.0, offset) / np.where(at_middle[:, None], slope, raw).dot(centers - middle)
        shift = (1.0 - scale * raw.sum(axis=1)) / len(centers)
        return scale[:, None] * raw + shift[:, None]


def _nearest_label(mos: Floats, centers: Floats, step: float) -> Floats:
    """Mass 1 at the nearest centre, 1/2 at each of two equally near ones."""
    distance = np.abs(centers - mos[:, None])
    near = distance <= distance.min(axis=1, keepdims=True) + 1e-12 * step
    return near / near.sum(axis=1, keepdims=True)


def _density(z: Floats) -> Floats:
    return np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def _check_levels(levels: int) -> None:
    if not isinstance(levels, (int, np.integer)) or levels < 1:
        raise ValueError(f"levels must be a whole number >= 1, got {levels!r}")


def _check_mos(mos: ArrayLike) -> Floats:
    """The MOS as float64, clipped by at most the slack."""
    values = np.asarray(mos, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"mos must be one-dimensional, one value per image, got shape {values.shape}")
    slack = _SLACK * (HIGH - LOW)
    bad = np.flatnonzero(~((values >= LOW - slack) & (values <= HIGH + slack)))
    if len(bad):
        raise ValueError(
            f"mos must be finite and within [{LOW}, {HIGH}], got {values[bad[0]]} at index {bad[0]} "
            f"({len(bad)} such values); map it to this range first"
        )
    return np.clip(values, LOW, HIGH)


def _check_std(std: ArrayLike, count: int) -> Floats:
    values = np.asarray(std, dtype=np.float64)
    if values.shape != (count,):
        raise ValueError(f"std must have one value per MOS, shape ({count},), got shape {values.shape}")
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        raise ValueError(
            f"std must be finite and >= 0, got {values[bad[0]]} at index {bad[0]} ({len(bad)} such values); "
            "leave these images out, or use linear_soft_label, which needs no std"
        )
    return values
