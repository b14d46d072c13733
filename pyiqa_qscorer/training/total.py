"""The total objective: the configured parts, computed from one batch and weighed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..labels import gaussian_soft_label
from ..model import QScorerOutput
from ..model.qscorer import IGNORED_LABEL
from . import objectives
from .config import ObjectiveConfig


def total_objective(
    config: ObjectiveConfig,
    formulation: str,
    output: QScorerOutput,
    mos: Tensor,
    mos_std: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the parts, and each part unweighted.

    Args:
        output: of `QScorerForScoring.forward` with labels.
        mos, mos_std: (B,) on the 1..5 scale; NaN spread where unknown (the data reader refuses it where it is needed).

    Returns:
        scalar total = scale x sum(weight x part), and the parts by name, detached.

    Raises:
        ValueError: no row has a quality token, or a part needs one score per row and rows have several.
    """
    assert output.labels is not None and output.logits is not None  # forward was given labels
    assert output.raw_scores is not None and output.quality_rows is not None and output.quality_logits is not None
    scores, rows = output.raw_scores, output.quality_rows
    parts: dict[str, Tensor] = {}
    for name in config.weights(formulation):
        if name == "cross_entropy":
            labels = output.labels
            if formulation == "level_soft":
                # DeQA-Score: the level position is taught by its soft label alone.
                labels = _without_quality_tokens(output)
            parts[name] = objectives.next_token_cross_entropy(output.logits, labels)
        elif name == "score":
            clamp = (0.0, 5.0) if config.clamp_score else None
            parts[name] = objectives.score_regression(scores, mos[rows], len(mos), clamp)
        elif name == "soft_label_kl":
            soft = gaussian_soft_label(
                mos[rows].cpu().numpy(), mos_std[rows].cpu().numpy(), output.quality_logits.shape[-1]
            )
            target = torch.from_numpy(soft).to(output.quality_logits)
            parts[name] = objectives.soft_label_kl(output.quality_logits, target)
        elif name == "fidelity":
            parts[name] = objectives.fidelity(scores, mos[rows], mos_std[rows])
        elif name == "pairwise_ranking":
            parts[name] = objectives.pairwise_ranking(scores, mos[rows], config.ranking_margin)
        else:
            parts[name] = getattr(objectives, name)(scores, mos[rows])
    weights = config.weights(formulation)
    total = config.scale * torch.stack([weights[name] * part for name, part in parts.items()]).sum()
    return total, {name: part.detach() for name, part in parts.items()}


def _without_quality_tokens(output: QScorerOutput) -> Tensor:
    """Labels in which the quality tokens are not supervised."""
    assert output.labels is not None and output.quality_ids is not None
    return output.labels.masked_fill(torch.isin(output.labels, output.quality_ids), IGNORED_LABEL)
