"""Labels over K levels: against definitions, scipy and loops, and on the opinion scores of real datasets."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from pyiqa_qscorer.data.labels import (
    gaussian_soft_label,
    level_centers,
    level_index,
    linear_soft_label,
    one_hot,
    restore,
)
from pyiqa_qscorer.data.opinions import OpinionColumns, read_opinion_table

RNG = np.random.default_rng(0)
MOS = np.concatenate([[1.0, 5.0, 3.0, 2.5], RNG.uniform(1, 5, 400)])
STD = np.concatenate([[0.7, 0.7, 0.7, 0.3], RNG.uniform(0.05, 1.5, 400)])
SOFT = pytest.mark.parametrize("variant", ["pdf", "cdf"])


@pytest.mark.parametrize("levels", [2, 3, 5, 7, 20])
def test_centers_of_any_count(levels):
    assert level_centers(levels) == pytest.approx([1 + i * 4 / (levels - 1) for i in range(levels)])
    middles = level_centers(levels, kind="interval_centers")
    assert middles == pytest.approx([1 + (i + 0.5) * 4 / levels for i in range(levels)])


def test_restoring_and_one_level():
    probabilities = RNG.dirichlet(np.ones(5), size=(3, 4))
    restored = restore(probabilities, level_centers(5))
    assert restored.shape == (3, 4)
    for index in np.ndindex(3, 4):
        assert restored[index] == pytest.approx(sum((level + 1) * probabilities[index][level] for level in range(5)))
    assert gaussian_soft_label([1.0, 4.0], [0.0, 1.0], 1).tolist() == [[1.0], [1.0]]
    raw = gaussian_soft_label([3.0], [1.0], 1, variant="cdf", adjust=False)
    assert raw == pytest.approx(np.array([[norm.cdf(2) - norm.cdf(-2)]]))


@pytest.mark.parametrize("levels", range(1, 21))
def test_borders_do_not_depend_on_rounding(levels):
    """Each border written in any of the usual ways, also in float32, falls to the level below it: as in Q-Align, levels
    are closed on the right."""
    for index in range(1, levels + 1):
        share = index / levels
        border = 1 + 4 * share
        ways = [border, 5 - 4 * (levels - index) / levels, 1 + (4 / levels) * index, float(np.float32(border))]
        assert level_index(ways, levels).tolist() == [index - 1] * len(ways)
        assert index == levels or level_index([border + 1e-4], levels) == index


@pytest.mark.parametrize("levels", [1, 2, 5, 9, 12])
def test_level_and_one_hot_against_the_published_interval_rule(levels):
    width, label = 4 / levels, one_hot(MOS, levels)
    assert label.shape == (len(MOS), levels) and (label.sum(axis=1) == 1).all()
    for value, found, marked in zip(MOS, level_index(MOS, levels), label.argmax(axis=1), strict=True):
        matching = [i for i in range(levels) if 1 + i * width - 1e-8 < value <= 1 + (i + 1) * width + 1e-8]
        assert found == marked == matching[0]


@pytest.mark.parametrize("levels", [2, 3, 5, 17])
def test_linear_label_restores_exactly(levels):
    label, centers = linear_soft_label(MOS, levels), level_centers(levels)
    step = centers[1] - centers[0]
    assert label == pytest.approx(np.maximum(0, 1 - np.abs(MOS[:, None] - centers) / step), abs=1e-12)
    assert label.min() >= 0 and label.sum(axis=1) == pytest.approx(np.ones(len(MOS)), abs=1e-15)
    assert np.abs(restore(label, centers) - MOS).max() <= 4e-13


def raw_by_scipy(mos, std, levels, variant):
    centers, step = np.linspace(1, 5, levels), 4 / (levels - 1)
    normal = norm(mos[:, None], std[:, None])
    if variant == "pdf":
        return normal.pdf(centers) * step
    return normal.cdf(centers + step / 2) - normal.cdf(centers - step / 2)


@SOFT
@pytest.mark.parametrize("levels", [4, 5, 11])
def test_raw_gaussian_label_against_scipy(variant, levels):
    label = gaussian_soft_label(MOS, STD, levels, variant, adjust=False)
    assert label == pytest.approx(raw_by_scipy(MOS, STD, levels, variant), rel=1e-9, abs=1e-12)


def adjusted_by_solving(mos, std, levels, variant, min_std=0.2, max_error=0.1):
    """Row by row: the two linear equations solved numerically, then the published clip and fallback."""
    centers, step = np.linspace(1, 5, levels), 4 / (levels - 1)
    rows = []
    for value, spread, raw in zip(mos, std, raw_by_scipy(mos, std, levels, variant), strict=True):
        row = interpolated = np.maximum(0, 1 - np.abs(centers - value) / step)
        if spread >= min_std * step:
            equations = np.array([[raw.sum(), levels], [raw @ centers, centers.sum()]])
            a, b = np.linalg.solve(equations, [1.0, value])
            row = np.maximum(a * raw + b, 0)
        rows.append(row if abs(row @ centers - value) <= max_error * step else interpolated)
    return np.array(rows)


@SOFT
@pytest.mark.parametrize("levels", [2, 4, 5, 10])
def test_adjusted_gaussian_label_against_a_linear_solver(variant, levels):
    step = 4 / (levels - 1)
    middle = np.abs(MOS - 3) < 1e-6  # the solver's matrix is singular there; tested below
    mos, std = MOS[~middle], STD[~middle] * step
    label = gaussian_soft_label(mos, std, levels, variant=variant)
    expected = adjusted_by_solving(mos, std, levels, variant)
    assert label == pytest.approx(expected, abs=1e-9)


@SOFT
@pytest.mark.parametrize("levels", [3, 5, 6])
def test_adjusted_label_without_negative_entries_sums_to_one_and_restores(variant, levels):
    step = 4 / (levels - 1)
    mos, std = np.linspace(2.9, 3.1, 21), np.full(21, 0.9 * step)
    label = gaussian_soft_label(mos, std, levels, variant=variant)
    assert label.min() > 0 and label.sum(axis=1) == pytest.approx(np.ones(len(mos)), abs=1e-12)
    assert restore(label, level_centers(levels)) == pytest.approx(mos, abs=1e-12)


@SOFT
@pytest.mark.parametrize("levels", [4, 5])
def test_at_the_middle_the_adjustment_is_the_limit_from_both_sides(variant, levels):
    """There the published script divides 0 by 1e-9 and gets a uniform label."""
    std = np.full(3, 2.4 / (levels - 1))
    below, at, above = gaussian_soft_label([3 - 1e-4, 3.0, 3 + 1e-4], std, levels, variant=variant)
    assert at == pytest.approx((below + above) / 2, abs=1e-7) and at == pytest.approx(at[::-1], abs=1e-12)
    assert at.max() - at.min() > 0.1
    near = gaussian_soft_label(3 + np.array([1e-6, 1e-7, 0.99e-7, 1e-9]), std[0] * np.ones(4), levels, variant=variant)
    assert near == pytest.approx(np.tile(at, (4, 1)), abs=1e-6)


@SOFT
def test_mirrored_clipped_and_certain_opinions(variant):
    """Clipping adds mass at the far end of the scale: of value 4 and 5 for a bad image, of 1 and 2 for a good one."""
    unlimited = {"variant": variant, "max_error": math.inf}
    label = gaussian_soft_label(MOS, STD, 5, **unlimited)
    assert gaussian_soft_label(6 - MOS, STD, 5, **unlimited)[:, ::-1] == pytest.approx(label, abs=1e-9)
    bad, good = restore(gaussian_soft_label([1.2, 4.8], [0.7, 0.7], 5, **unlimited), level_centers(5)) - [1.2, 4.8]
    assert bad > 2 * good > 0
    label = gaussian_soft_label(MOS, STD, 5, variant=variant)
    assert label.min() == 0 and label.sum(axis=1).min() >= 1 - 1e-12
    assert label.sum(axis=1).max() > 1.01
    normalised = gaussian_soft_label(MOS, STD, 5, variant=variant, normalise=True)
    assert normalised == pytest.approx(label / label.sum(axis=1, keepdims=True), abs=1e-15)
    label = gaussian_soft_label([1.0, 2.3, 2.5, 5.0], np.zeros(4), 5, variant=variant, adjust=False)
    assert label.tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 1]]
    small = gaussian_soft_label([1.0, 2.3, 2.5, 5.0], np.full(4, 1e-4), 5, variant="cdf", adjust=False)
    assert small == pytest.approx(label, abs=1e-12)


@SOFT
def test_narrow_opinions_and_errors_beyond_the_limit_fall_back_to_interpolation(variant):
    mos, std = [1.3, 2.5, 4.99], [0.0, 0.1, 0.199]
    assert (gaussian_soft_label(mos, std, 5, variant=variant) == linear_soft_label(mos, 5)).all()
    certain = gaussian_soft_label(mos, [0.0, 1e-300, 1e-7], 5, variant=variant, min_std=0.0, max_error=math.inf)
    assert (certain == linear_soft_label(mos, 5)).all()
    wider = gaussian_soft_label([2.4], [0.2 + 1e-9], 5, variant=variant)
    assert np.abs(wider - linear_soft_label([2.4], 5)).max() > 1e-3
    for max_error in (0.0, 0.02, 0.1):
        label = gaussian_soft_label(MOS, STD, 5, variant=variant, max_error=max_error)
        assert np.abs(restore(label, level_centers(5)) - MOS).max() <= max_error + 1e-12


@SOFT
@pytest.mark.filterwarnings("error")
def test_any_std_without_fallback_limits_gives_a_finite_label(variant):
    std = np.array([0.0, 1e-300, 1e-9, 1e-5, 1e-3, 0.01, 0.1, 1.0, 1e3, 1e8])
    for value in (1.0, 1.2, 2.5, 3.0, 4.9, 5.0):
        mos = np.full(len(std), value)
        for normalise in (False, True):
            unlimited = {"min_std": 0.0, "max_error": math.inf}
            label = gaussian_soft_label(mos, std, 5, variant=variant, normalise=normalise, **unlimited)
            assert np.isfinite(label).all() and label.min() >= 0
        raw = gaussian_soft_label(mos, std, 5, variant=variant, adjust=False, normalise=True)
        assert raw.sum(axis=1) == pytest.approx(np.ones(len(std)))


LABELS = {
    "level_index": level_index,
    "one_hot": one_hot,
    "linear": linear_soft_label,
    "gaussian": lambda mos, levels: gaussian_soft_label(mos, np.ones_like(mos), levels),
}


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize(
    "mos, levels, message",
    [
        ([2.0, 5.1], 5, r"within \[1.0, 5.0\], got 5.1 at index 1"),
        ([0.9], 5, "got 0.9 at index 0"),
        ([math.nan], 5, "must be finite"),
        ([math.inf], 5, "must be finite"),
        ([[2.0]], 5, "one-dimensional"),
        ([2.0], 0, "levels must be a whole number >= 1, got 0"),
        ([2.0], 2.5, "levels must be a whole number"),
    ],
)
def test_bad_mos_and_levels_are_named(label, mos, levels, message):
    with pytest.raises(ValueError, match=message):
        label(mos, levels)
    assert len(label(np.zeros(0), 5)) == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: gaussian_soft_label([2.0, 3.0], [0.5, -0.1], 5), "got -0.1 at index 1"),
        (lambda: gaussian_soft_label([2.0, 3.0], [math.nan, 1.0], 5), "must be finite"),
        (lambda: gaussian_soft_label([2.0, 3.0], [math.inf, 1.0], 5), "must be finite"),
        (lambda: gaussian_soft_label([2.0, 3.0], [0.5], 5), r"shape \(2,\), got shape \(1,\)"),
        (lambda: gaussian_soft_label([2.0, 3.0], 0.5, 5), "one value per MOS"),
        (lambda: gaussian_soft_label([2.0], [1.0], 5, variant="mass"), "variant must be one of pdf, cdf, got 'mass'"),
        (lambda: level_centers(5, kind="optimal"), "kind must be one of integers, interval_centers"),
    ],
)
def test_other_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def mean_error(label: np.ndarray, mos: np.ndarray) -> float:
    return float(np.abs(restore(label, level_centers(5)) - mos).mean())


def test_koniq_gaussian_label(shared: Path):
    """Its labels without adjustment, and one-hot ones, are in test_error_study.py."""
    votes = ("c1", "c2", "c3", "c4", "c5")
    path = shared / "data/labels/meta_info_KonIQ10kDataset.csv"
    opinions = read_opinion_table(path, OpinionColumns(std="std", votes=votes))
    mos, std = opinions.mos, opinions.std
    label = gaussian_soft_label(mos, std, 5)
    fallbacks = (label == linear_soft_label(mos, 5)).all(axis=1)
    assert fallbacks.sum() == 83  # all by the error limit: the smallest std is 0.37
    before = gaussian_soft_label(mos, std, 5, min_std=0.0, max_error=math.inf)
    assert mean_error(before, mos) == pytest.approx(0.0082, abs=1e-4)
    assert before.sum(axis=1).max() == pytest.approx(1.086, abs=1e-3)
    # What a softmax can learn of it:
    assert mean_error(gaussian_soft_label(mos, std, 5, normalise=True), mos) == pytest.approx(0.0136, abs=1e-4)


@SOFT
def test_kadid_gaussian_label(shared: Path, variant):
    """Opinions of KADID-10k with their own std, two of them 0."""
    path = shared / "data/labels/meta_info_KADID10kDataset.csv"
    opinions = read_opinion_table(path, OpinionColumns(mos="dmos", std="std"))
    label = gaussian_soft_label(opinions.mos, opinions.std, 5, variant=variant)
    none = opinions.std == 0
    assert none.sum() == 2 and (label[none] == linear_soft_label(opinions.mos[none], 5)).all()
    assert mean_error(label, opinions.mos) == pytest.approx(0.017 if variant == "pdf" else 0.023, abs=1e-3)
