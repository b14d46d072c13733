"""The total objective: the configured parts, computed from one batch and weighed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..data.labels import gaussian_soft_label
from ..model import QScorerConfig, QScorerOutput
from ..model.qscorer import IGNORED_LABEL
from . import objectives
from .config import ObjectiveConfig


def total_objective(
    config: ObjectiveConfig,
    network: QScorerConfig,
    output: QScorerOutput,
    mos: Tensor,
    mos_std: Tensor,
    dataset: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the parts, and each part unweighted.

    Parts that compare images compare those of one dataset only, because scales of different datasets are not the same
    even after mapping; their value is the mean over the datasets in the batch.

    Args:
        network: configuration of the model: formulation, quality tokens.
        output: of `QScorerForScoring.forward` with labels.
        mos, mos_std: (B,) on the 1..5 scale; NaN spread where unknown (the data reader refuses it where it is needed).
        dataset: (B,) index of the dataset that each image came from.

    Returns:
        scalar total = scale x sum(weight x part), and the parts by name, detached.

    Raises:
        ValueError: the output was computed without labels, or no token is supervised.
    """
    logits, labels, rows, scores = output.quality_logits, output.labels, output.quality_rows, output.raw_scores
    if output.logits is None or logits is None or labels is None or rows is None or scores is None:
        raise ValueError("output must come from a forward pass with labels")
    target, spread, source = mos[rows], mos_std[rows], dataset[rows]
    level_ids = network.quality_token_ids if network.formulation == "level_soft" else None
    if level_ids is not None:
        # DeQA-Score: the level position is taught by its soft label alone, over the whole vocabulary.
        labels = labels.masked_fill(torch.isin(labels, torch.tensor(level_ids, device=labels.device)), IGNORED_LABEL)

    def soft_label_kl() -> Tensor:
        soft = gaussian_soft_label(target.cpu().numpy(), spread.cpu().numpy(), len(network.quality_token_ids))
        of_levels = logits if level_ids is not None else logits[:, network.quality_token_ids]
        return objectives.soft_label_kl(of_levels, torch.from_numpy(soft).to(logits.device), level_ids)

    def per_dataset(objective: Callable[..., Tensor], *values: Tensor) -> Tensor:
        members = [source == index for index in source.unique()]
        return torch.stack([objective(*(value[member] for value in values)) for member in members]).mean()

    clamp = (0.0, 5.0) if config.clamp_score else None
    computed: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": partial(objectives.next_token_cross_entropy, output.logits, labels),
        "score": partial(objectives.score_regression, scores, target, len(mos), clamp),
        "soft_label_kl": soft_label_kl,
        "fidelity": partial(per_dataset, objectives.fidelity, scores, target, spread),
        "norm_in_norm": partial(per_dataset, objectives.norm_in_norm, scores, target),
        "pairwise_ranking": partial(
            per_dataset, partial(objectives.pairwise_ranking, margin=config.ranking_margin), scores, target
        ),
        "listwise_ranking": partial(per_dataset, objectives.listwise_ranking, scores, target),
        "plcc": partial(per_dataset, objectives.plcc, scores, target),
    }
    weights = config.weights(network.formulation)
    parts = {name: computed[name]() for name in weights}
    total = config.scale * torch.stack([weights[name] * part.float() for name, part in parts.items()]).sum()
    return total, {name: part.detach() for name, part in parts.items()}
