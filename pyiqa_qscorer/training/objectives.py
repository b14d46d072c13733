"""Training objectives: pure functions of tensors, each one unweighted scalar, lower is better; and their weighted sum.

The published objective is `next_token_cross_entropy` + `score_regression`; the others can be added to it. Conventions:

* `predictions` and `targets` are (N,), N the scored images of a batch, higher = better quality. Other shapes, and
  numbers outside their range, are a `ValueError`. Only `predictions` (or `logits`) are meant to be differentiated.
* float16 and bfloat16 inputs are computed in float32, and the result is float32; float64 stays float64.
* N = 0, and N = 1 where the objective compares images: 0, connected to the graph, gradient 0. Equal predictions, equal
  targets: defined, with a finite gradient. A non-finite input shows as a non-finite loss.
* Objectives that compare images do so over all they are given: call them once per dataset, whose scores compare ([2]).

References:

    [1] Q-Scorer, Tang et al., arXiv 2511.07812, and its published code.
    [2] DeQA-Score, You et al., CVPR 2025, and its published code.
    [3] FRank (fidelity loss), Tsai et al., SIGIR 2007; for image quality UNIQUE, Zhang et al., TIP 2021.
    [4] Norm-in-Norm, Li et al., ACM MM 2020, and its published code (LinearityIQA).
    [5] RankIQA, Liu et al., ICCV 2017.
    [6] ListMLE, Xia et al., ICML 2008; ties as in Breslow, Biometrics 1974.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.labels import gaussian_soft_label
from ..model import QScorerOutput
from ..model.network import IGNORED_LABEL, QualityConfig, next_token_cross_entropy


def score_regression(
    predictions: Tensor, targets: Tensor, num_rows: int, clamp: tuple[float, float] | None = (0.0, 5.0)
) -> Tensor:
    """Published score loss [1]: sum_n (clamp(predictions_n) - targets_n)^2 / num_rows.

    The sum is over score positions, the divisor counts rows of the batch: a row with two score tokens weighs double.
    The clamp stops the gradient of predictions outside the range, not of those on its ends, where bfloat16 often lands.

    Args:
        num_rows: B >= 1, rows of the batch, with and without score tokens.
        clamp: range of the scores; None: no clamp.
    """
    predictions, targets = _wide(predictions=predictions, targets=targets)
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, the rows of the batch, got {num_rows}")
    if clamp is not None:
        inside = (predictions >= clamp[0]) & (predictions <= clamp[1])
        # Tensor.clamp alone passes the gradient on the ends in the published torch 2.0, and no longer in 2.15.
        predictions = torch.where(inside, predictions, predictions.detach().clamp(*clamp))
    return (predictions - targets).square().sum() / num_rows


def soft_label_kl(logits: Tensor, soft: Tensor, level_ids: Sequence[int] | None = None) -> Tensor:
    """Divergence of the predicted level probabilities from a soft label: mean_n sum_k s_nk log(s_nk / p_nk).

    Without `level_ids`, p is the softmax over the K levels alone. With `level_ids`, p is the softmax over the whole
    vocabulary read at the K levels, so that mass on other tokens costs too: the objective of [2], which adds the cross
    entropy of all other answer tokens (label the level token `IGNORED_LABEL` for that).

    Args:
        logits: (N, K) at the positions that predict the level token; with `level_ids` (N, V).
        soft: (N, K) label >= 0, see `pyiqa_qscorer.data.labels`.
        level_ids: ids of the K level tokens, in the order of `soft`.

    Returns:
        Scalar, >= 0 for rows of `soft` that sum to 1 and 0 where p equals them. For a row of another sum S (clipped
        labels of [2]) the minimum is at soft / S, and is S log S.
    """
    levels = logits.shape[-1] if level_ids is None else len(level_ids)
    if logits.ndim != 2 or soft.shape != (logits.shape[0], levels):
        given = f"{tuple(logits.shape)}, {tuple(soft.shape)} and level_ids {level_ids}"
        raise ValueError(f"logits must be (N, K), or (N, V) with K level_ids, and soft (N, K), got {given}")
    log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    if level_ids is not None:
        log_probabilities = log_probabilities[:, torch.tensor(list(level_ids), device=logits.device)]
    soft = soft.to(log_probabilities.dtype)
    return F.kl_div(log_probabilities, soft, reduction="sum") / max(len(soft), 1)


def fidelity(predictions: Tensor, mos: Tensor, std: Tensor) -> Tensor:
    """Fidelity loss [3] between predicted and human preferences, averaged over all pairs i < j; in [0, 1].

    Thurstone's model, independent opinions: image i is preferred to j with probability

        human:     g_ij = Phi((mos_i - mos_j) / sqrt(std_i^2 + std_j^2))
        predicted: p_ij = Phi((q_i - q_j) / sqrt(2)), as [2] trains

        loss = mean_ij [1 - sqrt(p_ij g_ij) - sqrt((1 - p_ij) (1 - g_ij))]

    The square roots are taken through log Phi, whose gradient is finite also at probabilities of 0 and 1; [2] and
    UNIQUE add 1e-8 under each root instead (difference at most 2e-4). A sum of two variances counts as at least 1e-8,
    as in [2]: a std of 0 means that any difference of MOS decides.
    """
    predictions, mos, std = _wide(predictions=predictions, mos=mos, std=std)
    first, second = torch.triu_indices(len(predictions), len(predictions), offset=1, device=predictions.device)

    def advantage(scores: Tensor, spread: Tensor) -> Tensor:
        variance = (spread[first].square() + spread[second].square()).clamp(min=1e-8)
        # Phi(-40) is 0 in any dtype; the clamp keeps the square of z from overflowing.
        return ((scores[first] - scores[second]) / variance.sqrt()).clamp(-40.0, 40.0)

    predicted, human = advantage(predictions, torch.ones_like(predictions)), advantage(mos, std)
    log_phi = torch.special.log_ndtr
    prefer_first = (0.5 * (log_phi(predicted) + log_phi(human))).exp()
    prefer_second = (0.5 * (log_phi(-predicted) + log_phi(-human))).exp()
    return (1.0 - prefer_first - prefer_second).sum() / max(len(first), 1)


def norm_in_norm(predictions: Tensor, targets: Tensor) -> Tensor:
    """Norm-in-Norm loss [4]: distance of the two score vectors after centring and scaling them to length 1; in [0, 1].

        a = (x - mean x) / |x - mean x|_2 for predictions and targets,     loss = |a_pred - a_targets|_1 / (2 sqrt N)

    i.e. a share of the largest possible distance, with the norms that [4] trains, without its monotonicity term.
    Invariant to affine maps with positive slope of either argument.

    Constant predictions or targets (up to rounding, batch of one) have no direction: they count as the zero vector and
    the gradient is 0. [4] divides by 1e-8 there, a gradient that would drown every other.
    """
    predictions, targets = _wide(predictions=predictions, targets=targets)
    if not len(predictions):
        return predictions.sum()
    difference = _direction(predictions, targets) - _direction(targets, predictions)
    return (difference.abs() / (2.0 * len(predictions) ** 0.5)).sum()


def plcc(predictions: Tensor, targets: Tensor) -> Tensor:
    """(1 - r) / 2 with Pearson's correlation r of predictions and targets: in [0, 1] up to rounding.

    Invariant to affine maps with positive slope of either argument. Where r is undefined (constant predictions or
    targets up to rounding, batch of one) it counts as 0, with gradient 0.
    """
    predictions, targets = _wide(predictions=predictions, targets=targets)
    if not len(predictions):
        return predictions.sum()
    correlation = (_direction(predictions, targets) * _direction(targets, predictions)).sum()
    return (1.0 - correlation) / 2.0


def pairwise_ranking(predictions: Tensor, targets: Tensor, margin: float) -> Tensor:
    """Hinge ranking loss [5]: mean of max(0, margin - (q_i - q_j)) over the pairs with targets_i > targets_j.

    Pairs with equal targets are left out. With margin 0 constant predictions are a minimum; use a positive one.

    Args:
        margin: by how much the better image must lead, in units of the scores, >= 0.
    """
    if not margin >= 0:
        raise ValueError(f"margin must be >= 0, got {margin}")
    predictions, targets = _wide(predictions=predictions, targets=targets)
    first, second = torch.triu_indices(len(predictions), len(predictions), offset=1, device=predictions.device)
    order = (targets[first] - targets[second]).sign()
    shortfall = torch.relu(margin - order * (predictions[first] - predictions[second]))
    return (shortfall * order.abs()).sum() / order.abs().sum().clamp(min=1.0)


def listwise_ranking(predictions: Tensor, targets: Tensor) -> Tensor:
    """ListMLE [6]: negative log likelihood of the order of the targets under Plackett-Luce, divided by N.

        loss = 1/N sum_i [log sum_{j: targets_j <= targets_i} exp(q_j) - q_i]

    i.e. each image is drawn first among those that are not better. Depends on the targets' order only, and not on a
    constant added to the predictions. Equal targets: each is drawn among all of them, so the loss does not depend on
    the order of the batch (usual implementations break ties at random).

    Without ties the loss nears 0 as the right order's gaps grow; tied images are best predicted equal.
    """
    predictions, targets = _wide(predictions=predictions, targets=targets)
    if not len(predictions):
        return predictions.sum()
    candidates = predictions[None, :].masked_fill(targets[None, :] > targets[:, None], -math.inf)
    return (candidates.logsumexp(dim=1) - predictions).mean()


def total_objective(
    weights: Mapping[str, float],
    network: QualityConfig,
    output: QScorerOutput,
    opinions: tuple[Tensor, Tensor, Tensor],
    ranking_margin: float = 0.1,
    clamp: tuple[float, float] | None = (0.0, 5.0),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the parts that `weights` names, and each part unweighted, detached.

    Parts that compare images compare those of one dataset only, because scales of different datasets are not the same
    even after mapping; their value is the mean over the datasets in the batch.

    Args:
        network: configuration of the model.
        output: of its forward pass with labels.
        opinions: MOS and spread (B,) on 1..5, NaN where a spread is unknown, and (B,) index of the image's dataset.

    Raises:
        ValueError: the output was computed without labels, or no token is supervised.
    """
    logits, labels, rows, scores = output.quality_logits, output.labels, output.quality_rows, output.raw_scores
    if output.logits is None or logits is None or labels is None or rows is None or scores is None:
        raise ValueError("output must come from a forward pass with labels")
    target, spread, source = (values[rows] for values in opinions)
    ids = list(network.quality_token_ids)
    level_ids = ids if network.formulation == "level_soft" else None
    if level_ids is not None:  # [2]: the level position is taught by its soft label alone, over the whole vocabulary
        labels = labels.masked_fill(torch.isin(labels, labels.new_tensor(level_ids)), IGNORED_LABEL)

    def soft_kl() -> Tensor:
        soft = gaussian_soft_label(target.cpu().numpy(), spread.cpu().numpy(), len(ids))
        of_levels = logits if level_ids is not None else logits[:, ids]
        return soft_label_kl(of_levels, torch.from_numpy(soft).to(logits.device), level_ids)

    def per_dataset(objective: Callable[..., Tensor], *others: Tensor) -> Callable[[], Tensor]:
        members = [source == index for index in source.unique()]
        values = (scores, target, *others)
        return lambda: torch.stack([objective(*(value[one] for value in values)) for one in members]).mean()

    computed: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": partial(next_token_cross_entropy, output.logits, labels),
        "score": partial(score_regression, scores, target, len(opinions[0]), clamp),
        "soft_label_kl": soft_kl,
        "fidelity": per_dataset(fidelity, spread),
        "norm_in_norm": per_dataset(norm_in_norm),
        "pairwise_ranking": per_dataset(partial(pairwise_ranking, margin=ranking_margin)),
        "listwise_ranking": per_dataset(listwise_ranking),
        "plcc": per_dataset(plcc),
    }
    parts = {name: computed[name]() for name in weights}
    total = torch.stack([weights[name] * part.float() for name, part in parts.items()]).sum()
    return total, {name: part.detach() for name, part in parts.items()}


def _direction(values: Tensor, other: Tensor) -> Tensor:
    """(values - mean) / length of that; zeros where `values` are constant; without gradient where `other` are."""
    constant = _constant(values)
    # Dividing by the spread first changes nothing but keeps powers in range.
    spread = torch.where(constant, 1.0, (values.max() - values.min()).detach())
    # The norm has no gradient at 0, so it never sees the zeros.
    scaled = torch.where(constant, 1.0, (values - values.mean()) / spread)
    direction = torch.where(constant, 0.0, scaled / torch.linalg.vector_norm(scaled))
    return torch.where(_constant(other), direction.detach(), direction)


def _constant(values: Tensor) -> Tensor:
    """Whether all values are equal up to a few roundings."""
    values = values.detach()
    return values.max() - values.min() <= 8 * torch.finfo(values.dtype).eps * values.abs().max()


def _wide(**arguments: Tensor) -> list[Tensor]:
    """The arguments in the dtype of the first, at least float32. All must be (N,): broadcasting would hide mistakes."""
    shapes = {name: tuple(values.shape) for name, values in arguments.items()}
    first = next(iter(arguments.values()))
    if first.ndim != 1 or len(set(shapes.values())) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{' and '.join(shapes)} must be one-dimensional and of equal length, got {listed}")
    return [values.to(torch.promote_types(first.dtype, torch.float32)) for values in arguments.values()]
