"""Objectives: against loops, numpy and scipy; their properties; edge cases."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, pearsonr
from torch import Tensor
from torch.autograd import gradcheck

from pyiqa_qscorer.model.qscorer import IGNORED_LABEL, quality_positions
from pyiqa_qscorer.training.objectives import (
    fidelity,
    listwise_ranking,
    next_token_cross_entropy,
    norm_in_norm,
    pairwise_ranking,
    plcc,
    score_regression,
    soft_label_kl,
)

IGNORED = torch.tensor([[5, IGNORED_LABEL]])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])

# Objectives of predictions and targets alone, with their other arguments at typical values.
SCORE_OBJECTIVES = {
    "score_regression": lambda p, t: score_regression(p, t, max(len(p), 1)),
    "fidelity": lambda p, t: fidelity(p, t, torch.full_like(t, 0.5)),
    "norm_in_norm": norm_in_norm,
    "plcc": plcc,
    "pairwise": lambda p, t: pairwise_ranking(p, t, 0.3),
    "listwise": listwise_ranking,
}
COMPARING = {name: loss for name, loss in SCORE_OBJECTIVES.items() if name != "score_regression"}
EVERY = pytest.mark.parametrize("objective", SCORE_OBJECTIVES.values(), ids=SCORE_OBJECTIVES)


def scores(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predictions, some of them outside [0, 5], and MOS, some of them equal; float64."""
    generator = torch.Generator().manual_seed(seed)
    targets = 1 + 4 * torch.rand(count, generator=generator, dtype=torch.float64)
    if count > 4:
        targets[3] = targets[1]
    return targets + 1.5 * torch.randn(count, generator=generator, dtype=torch.float64), targets


def gradient(objective, predictions: Tensor, *rest: Tensor) -> Tensor:
    predictions = predictions.detach().clone().requires_grad_()
    objective(predictions, *rest).backward()
    return predictions.grad


def texts(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, 7, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :4] = labels[1, 5:] = IGNORED_LABEL
    return logits.to(dtype), labels


def test_cross_entropy_against_a_loop():
    logits, labels = texts()
    terms = []
    for row in range(3):
        for position in range(6):
            wanted = labels[row, position + 1].item()
            if wanted != IGNORED_LABEL:
                values = logits[row, position].numpy()
                terms.append(math.log(np.exp(values).sum()) - values[wanted])
    assert len(terms) == 3 * 6 - 3 - 2
    loss = next_token_cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-12)
    logits[:, -1], labels[:, 0] = 50.0, 3  # neither counts
    assert next_token_cross_entropy(logits, labels) == loss
    assert gradcheck(lambda x: next_token_cross_entropy(x, labels), logits.requires_grad_())


@HALVES
def test_cross_entropy_and_soft_labels_in_half_precision(dtype):
    logits, labels = texts(dtype)
    loss = next_token_cross_entropy(logits, labels)
    flat = torch.nn.CrossEntropyLoss()(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
    assert loss.dtype == dtype and loss.item() == pytest.approx(flat.item(), rel=torch.finfo(dtype).eps)
    assert loss.item() == pytest.approx(next_token_cross_entropy(logits.double(), labels).item(), rel=0.02)
    logits, soft = level_logits()
    loss = soft_label_kl(logits.to(dtype), soft.float())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(soft_label_kl(logits.to(dtype).double(), soft).item(), rel=1e-5)


def test_score_positions_stand_before_score_tokens_in_order():
    labels = torch.tensor([[7, 1, 9, 7, 9], [1, 1, 1, 1, 1], [2, 8, 9, -100, 7]])
    rows, positions = quality_positions(labels, [9, 8, 7])
    assert rows.tolist() == [0, 0, 0, 2, 2, 2] and positions.tolist() == [1, 2, 3, 0, 1, 3]
    labels = torch.zeros(2, 4, dtype=torch.long)
    assert [len(indices) for indices in quality_positions(labels, [9])] == [0, 0]
    with pytest.raises(ValueError, match="quality_token_ids must name at least one token"):
        quality_positions(labels, [])
    with pytest.raises(ValueError, match=r"labels must be \(B, T\)"):
        quality_positions(labels[0], [9])


def test_score_regression_by_hand_and_clamped():
    predictions, targets = scores()
    expected = sum((min(max(p, 0), 5) - t) ** 2 for p, t in zip(predictions.tolist(), targets.tolist(), strict=True))
    assert predictions.min() < 0 or predictions.max() > 5
    assert score_regression(predictions, targets, 7).item() == pytest.approx(expected / 7)
    unclamped = ((predictions - targets) ** 2).sum().item() / 7
    assert score_regression(predictions, targets, 7, clamp=None).item() == pytest.approx(unclamped)
    predictions, targets = torch.tensor([-0.1, 0.0, 2.0, 5.0, 5.1]), torch.full((5,), 3.0)
    clamped = gradient(lambda p: score_regression(p, targets, 5), predictions)
    assert clamped.tolist() == pytest.approx([0.0, -1.2, -0.4, 0.8, 0.0])
    free = gradient(lambda p: score_regression(p, targets, 5, clamp=None), predictions)
    assert free.tolist() == pytest.approx([-1.24, -1.2, -0.4, 0.8, 0.84])
    assert score_regression(torch.zeros(0), torch.zeros(0), 4).item() == 0  # no score token in the batch


def level_logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    soft = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    soft[0, 1:3] = 0.0
    return 2 * torch.randn(6, 5, generator=generator, dtype=dtype), soft / soft.sum(dim=1, keepdim=True)


def kl_by_numpy(probabilities: np.ndarray, soft: np.ndarray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(soft > 0, soft * np.log(soft / probabilities), 0.0)
    return float(terms.sum(axis=1).mean())


def test_soft_label_kl_over_levels_and_vocabulary_is_zero_only_at_the_label():
    logits, soft = level_logits()
    expected = kl_by_numpy(logits.softmax(dim=1).numpy(), soft.numpy())
    assert soft_label_kl(logits, soft).item() == pytest.approx(expected)
    assert gradcheck(lambda x: soft_label_kl(x, soft), logits.requires_grad_())
    _, soft = level_logits()
    generator = torch.Generator().manual_seed(3)
    logits, ids = torch.randn(6, 40, generator=generator, dtype=torch.float64), [31, 2, 17, 8, 25]
    expected = kl_by_numpy(logits.softmax(dim=1)[:, ids].numpy(), soft.numpy())
    closed, opened = soft_label_kl(logits[:, ids], soft), soft_label_kl(logits, soft, ids)
    assert opened.item() == pytest.approx(expected)
    leaked = -(logits.softmax(dim=1)[:, ids].sum(dim=1)).log().mean()
    assert (opened - closed).item() == pytest.approx(leaked.item())
    assert gradcheck(lambda x: soft_label_kl(x, soft, ids), logits.requires_grad_())
    _, soft = level_logits()
    soft = soft + 0.05
    soft = soft / soft.sum(dim=1, keepdim=True)
    assert soft_label_kl(soft.log(), soft).item() == pytest.approx(0, abs=1e-15)
    assert gradient(soft_label_kl, soft.log(), soft).abs().max() < 1e-15
    assert soft_label_kl(soft.log() + 3.0, soft).item() == pytest.approx(0, abs=1e-15)
    assert soft_label_kl(soft.log().flip(1), soft).item() > 0.01
    soft = soft * 1.05  # not normalised: least at the normalised label
    total = soft.sum(dim=1)
    at_minimum = (soft / total[:, None]).log()
    assert gradient(soft_label_kl, at_minimum, soft).abs().max() < 1e-15
    assert soft_label_kl(at_minimum, soft).item() == pytest.approx((total * total.log()).mean().item())


def fidelity_by_loop(predictions, mos, std) -> float:
    terms = []
    for i, j in itertools.combinations(range(len(mos)), 2):
        human = norm.cdf((mos[i] - mos[j]) / math.hypot(std[i], std[j]))
        predicted = norm.cdf((predictions[i] - predictions[j]) / math.sqrt(2))
        terms.append(1 - math.sqrt(human * predicted) - math.sqrt((1 - human) * (1 - predicted)))
    return float(np.mean(terms))


def test_fidelity_against_a_loop_over_pairs_and_the_published_formula():
    """DeQA-Score: erf(difference / 2) for unit spreads, 1e-8 under each root."""
    predictions, mos = scores()
    std = 0.3 + torch.rand(12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    loss = fidelity(predictions, mos, std).item()
    assert loss == pytest.approx(fidelity_by_loop(*(values.numpy() for values in (predictions, mos, std))))
    first, second = torch.triu_indices(12, 12, offset=1)
    predicted = 0.5 * (1 + torch.erf((predictions[first] - predictions[second]) / 2))
    variance = 2 * (std[first] ** 2 + std[second] ** 2 + 1e-8)
    human = 0.5 * (1 + torch.erf((mos[first] - mos[second]) / variance.sqrt()))
    published = (1 - (predicted * human + 1e-8).sqrt() - ((1 - predicted) * (1 - human) + 1e-8).sqrt()).mean()
    assert loss == pytest.approx(published.item(), abs=1e-4)
    assert gradcheck(lambda p: fidelity(p, mos[:6], std[:6]), predictions[:6].requires_grad_())


def test_fidelity_is_least_at_equal_preferences_and_a_std_of_zero_is_certain():
    predictions, mos = scores()
    one = torch.ones(12, dtype=torch.float64)
    assert fidelity(mos + 7, mos, one).item() == pytest.approx(0, abs=1e-12)
    assert fidelity(3 * mos, mos, one / 3).item() == pytest.approx(0, abs=1e-12)
    assert gradient(fidelity, mos, mos, one).abs().max() < 1e-12
    assert fidelity(mos, predictions, one).item() == pytest.approx(fidelity(predictions, mos, one).item())
    assert 0 < fidelity(predictions, mos, one) < 1
    predictions = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    mos, zero = torch.tensor([2.999, 3.0, 3.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    phi = norm.cdf(np.array([1.0, 3.0, 2.0]) / math.sqrt(2))
    tied = 1 - math.sqrt(phi[2] / 2) - math.sqrt((1 - phi[2]) / 2)
    expected = (1 - math.sqrt(phi[0]) + 1 - math.sqrt(phi[1]) + tied) / 3
    assert fidelity(predictions, mos, zero).item() == pytest.approx(expected)
    assert gradient(lambda p: fidelity(p, mos, zero), predictions).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fidelity_has_a_finite_gradient_however_wrong_the_scores(dtype):
    predictions, mos = (values.to(dtype) for values in scores())
    for scale, std in itertools.product((1e-3, 1.0, 30.0, 1e6, 1e30), (0.0, 1e-20, 0.5)):
        spread = torch.full_like(mos, std)
        assert gradient(fidelity, scale * -predictions, mos, spread).isfinite().all()
        assert fidelity(scale * -predictions, mos, spread).isfinite()


def test_norm_in_norm_by_numpy():
    predictions, targets = scores()

    def direction(values):
        return (values - values.mean()) / np.linalg.norm(values - values.mean())

    distance = np.abs(direction(predictions.numpy()) - direction(targets.numpy())).sum()
    assert norm_in_norm(predictions, targets).item() == pytest.approx(distance / (2 * 12**0.5))
    assert gradcheck(lambda x: norm_in_norm(x, targets), predictions.requires_grad_())


@pytest.mark.parametrize("name", ["norm_in_norm", "plcc"])
def test_correlation_objectives_do_not_see_affine_maps_and_lie_in_their_range(name):
    objective = COMPARING[name]
    predictions, targets = scores()
    loss = objective(predictions, targets).item()
    assert name != "plcc" or loss == pytest.approx((1 - pearsonr(predictions, targets)[0]) / 2)
    for scale, shift in ((3.0, -2.0), (1e-12, 0.0), (1e-12, 1e-9), (1e12, 5.0), (1e150, 0.0)):
        assert objective(scale * predictions + shift, targets).item() == pytest.approx(loss, rel=1e-6)
        assert objective(predictions, scale * targets + shift).item() == pytest.approx(loss, rel=1e-6)
    assert objective(0.1 * targets + 9, targets).item() == pytest.approx(0, abs=1e-12)
    assert objective(-targets, targets).item() > loss
    for seed in range(50):
        assert -1e-12 <= objective(*scores(count=2 + seed % 7, seed=seed)).item() <= 1 + 1e-12
    two = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert objective(-two, two).item() == pytest.approx(1.0)  # the bound is reached


@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_predictions_have_no_direction(value, dtype):
    """0.1 is not exact in binary: its mean differs from it by a rounding, which must not be blown up to a direction."""
    targets = torch.tensor([1.0, 2.0, 4.0, 4.5, 3.0], dtype=dtype)
    constant = torch.full((5,), value, dtype=dtype)
    rounded = constant.clone()
    rounded[2] = torch.nextafter(constant[2], constant[2] + 1)
    assert plcc(constant, targets).item() == 0.5
    assert plcc(rounded, targets).item() == 0.5 or value == 0
    assert plcc(targets, constant).item() == 0.5
    for objective in (plcc, norm_in_norm):
        assert (gradient(objective, constant, targets) == 0).all()
        assert (gradient(objective, targets, constant) == 0).all() and objective(constant, targets) > 0


@pytest.mark.parametrize("margin", [0.0, 0.3, 2.0])
def test_pairwise_ranking_against_a_loop(margin):
    predictions, targets = scores()
    pairs = list(zip(predictions.tolist(), targets.tolist(), strict=True))
    terms = [max(0.0, margin - (p_i - p_j)) for p_i, t_i in pairs for p_j, t_j in pairs if t_i > t_j]
    assert len(terms) == 12 * 11 // 2 - 1
    assert pairwise_ranking(predictions, targets, margin).item() == pytest.approx(np.mean(terms))
    predictions, targets = torch.tensor([2.0, 0.0, 1.0, 0.9]), torch.tensor([3.0, 1.0, 2.0, 2.0])
    assert pairwise_ranking(predictions, targets, 0.9).item() == 0  # every better image leads by the margin
    assert pairwise_ranking(predictions, targets, 1.0).item() == pytest.approx(0.1 / 5)
    assert pairwise_ranking(targets, torch.ones(4), 1.0).item() == 0


def test_listwise_ranking_is_the_likelihood_with_ties_and_invariances():
    predictions, targets = scores(4)
    order = targets.argsort(descending=True).tolist()
    likelihood, left = 1.0, list(order)
    for index in order:
        likelihood *= math.exp(predictions[index]) / sum(math.exp(predictions[other]) for other in left)
        left.remove(index)
    assert listwise_ranking(predictions, targets).item() == pytest.approx(-math.log(likelihood) / 4)
    example = listwise_ranking(torch.tensor([0.6, 0.8]), torch.tensor([1.0, 0.0]))
    assert 2 * example.item() == pytest.approx(0.7981389)  # the documentation of TensorFlow Ranking: summed
    # Equal targets: neither order is right, so the loss is least where they are predicted equal.
    a, b, c = 0.3, -0.5, 0.1
    everything = math.log(math.exp(a) + math.exp(b) + math.exp(c))
    loss = listwise_ranking(torch.tensor([a, b, c]), torch.tensor([2.0, 2.0, 1.0]))
    assert loss.item() == pytest.approx((everything - a + everything - b + c - c) / 3)
    equal = torch.full((3,), 0.7)
    assert listwise_ranking(equal, torch.ones(3)).item() == pytest.approx(math.log(3))
    assert gradient(listwise_ranking, equal, torch.ones(3)).abs().max() < 1e-6
    predictions, targets = scores()
    loss = listwise_ranking(predictions, targets).item()
    assert listwise_ranking(predictions + 4, targets.exp()).item() == pytest.approx(loss)
    assert listwise_ranking(1e4 * targets, targets).item() == pytest.approx(2 * math.log(2) / 12)  # of the tie
    assert listwise_ranking(-targets, targets) > loss


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: next_token_cross_entropy(torch.zeros(2, 5, 11), torch.zeros(2, 4)), r"got \(2, 5, 11\) and \(2, 4\)"),
        # The first label predicts nothing.
        (lambda: next_token_cross_entropy(torch.zeros(1, 2, 11), IGNORED), "labels must supervise at least one token"),
        (lambda: score_regression(torch.zeros(2), torch.zeros(2), 0), "num_rows must be at least 1"),
        (lambda: soft_label_kl(torch.zeros(6, 5), torch.zeros(6, 4)), r"soft \(N, K\)"),
        (lambda: soft_label_kl(torch.zeros(6, 5), torch.zeros(6)), r"soft \(N, K\)"),
        (lambda: pairwise_ranking(*scores(), -0.1), "margin must be >= 0"),
        (lambda: pairwise_ranking(*scores(), math.nan), "margin must be >= 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@EVERY
def test_descent_improves_in_the_direction_of_differences_in_any_order(objective):
    predictions, targets = scores()
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    loss = objective(predictions, targets).item()
    assert objective(predictions[shuffled], targets[shuffled]).item() == pytest.approx(loss)
    if objective in COMPARING.values():
        assert objective(predictions + 2, targets).item() == pytest.approx(loss)
    assert gradcheck(lambda x: objective(x, targets), predictions.requires_grad_())
    predictions, targets = scores()
    loss = objective(predictions, targets)
    assert objective(predictions - 1e-3 * gradient(objective, predictions, targets), targets) < loss
    assert objective(targets + 0.1 * (predictions - targets), targets) < loss


@EVERY
def test_edge_cases_are_finite_and_bad_shapes_refused(objective):
    for count in (0, 1):
        predictions = torch.full((count,), 2.0, requires_grad=True)
        loss = objective(predictions, torch.full((count,), 3.0))
        loss.backward()
        assert loss.shape == ()
        if count == 0:
            assert loss.item() == 0
        elif objective in COMPARING.values():
            assert loss.item() in (0.0, 0.5)  # 0.5: no correlation
            assert predictions.grad.item() == 0
    for predictions in ([2.0, 2.0, 2.0], [1.0, 2.0, 2.0], [0.1, 0.1, 0.1]):
        for targets in ([3.0, 3.0, 3.0], [3.0, 3.0, 1.0], [1.0, 2.0, 3.0]):
            values = torch.tensor(predictions), torch.tensor(targets)
            assert objective(*values).isfinite()
            slope = gradient(objective, *values)
            assert slope.isfinite().all() and slope.abs().max() < 100
    predictions, targets = scores()
    with pytest.raises(ValueError, match="one-dimensional and of equal length"):
        objective(predictions[:, None], targets)
    with pytest.raises(ValueError, match=r"predictions \(12,\), (targets|mos) \(1,\)"):
        objective(predictions, targets[:1])
    predictions[4] = math.nan
    assert not objective(predictions, targets).isfinite()


@EVERY
@HALVES
def test_halves_are_computed_in_float32(objective, dtype):
    predictions, targets = (values.to(dtype) for values in scores(40))
    loss = objective(predictions, targets.float())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(objective(predictions.double(), targets.double()).item(), rel=2e-5, abs=1e-6)
    slope = gradient(objective, predictions, targets)
    assert slope.dtype == dtype and slope.isfinite().all()
