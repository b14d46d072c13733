"""Noise in what a network emits: simulation against formulas."""

import math

import numpy as np
import pytest
from scipy.special import softmax

from pyiqa_qscorer.analysis.conversion_error import LABELS, make_label
from pyiqa_qscorer.analysis.simulation import certain_logits, noisy_levels, noisy_regression, small_noise_error
from pyiqa_qscorer.data.labels import level_centers

RNG = np.random.default_rng(0)
MOS = 1 + 4 * RNG.beta(3, 2, 400)
STD = RNG.uniform(0.3, 1.0, 400)


@pytest.mark.parametrize("name", LABELS)
def test_certain_logits_are_the_label_up_to_the_mixture(name: str) -> None:
    label = make_label(name, MOS, STD, 5)
    share = label / label.sum(axis=1, keepdims=True)
    assert softmax(certain_logits(label), axis=1) == pytest.approx(0.99 * share + 0.002, abs=1e-12)


@pytest.mark.parametrize("name", ["one_hot", "linear", "gaussian_pdf", "gaussian_cdf_raw"])
def test_second_order_formula_meets_the_simulation_for_small_noise(name: str) -> None:
    found = noisy_levels(name, MOS, STD, 5, noise=0.05, draws=200)
    allowed = 4 * found.mse_standard_error + 0.05**4
    assert found.rmse**2 == pytest.approx(found.analytic_rmse**2, abs=allowed)
    without_noise = small_noise_error(certain_logits(make_label(name, MOS, STD, 5)), level_centers(5), MOS, 0.0)
    if name != "one_hot":  # whose logits are too far apart for so little noise to matter
        assert abs(found.rmse**2 - without_noise) > 3 * allowed


def test_noise_free_and_regression_errors_are_the_formulas() -> None:
    found, expected = noisy_levels("linear", MOS, None, 5, noise=0.0), 0.99 * MOS + 0.01 * 3 - MOS
    assert found.rmse == pytest.approx(math.sqrt(np.mean(expected**2)))
    assert found.mae == pytest.approx(np.mean(np.abs(expected))) and found.srcc == pytest.approx(1.0)
    assert found.mse_standard_error == pytest.approx(0.0, abs=1e-12)
    found = noisy_regression(MOS, 0.3, draws=100)
    assert found.analytic_rmse == 0.3 and found.rmse**2 == pytest.approx(0.09, abs=4 * found.mse_standard_error)
    assert noisy_regression(MOS, 0.0).rmse == 0.0
