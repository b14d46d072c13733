"""Conversion error of trained networks on labelled pictures, beside the predicted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.labels import Floats, level_centers, restore
from ..data.opinions import HIGH, LOW
from ..errors import QScorerError
from ..metric import QScorer
from ..registry import SCORE_RANGE
from ..scorer import Scorer
from ..training.dataset import LabelledImages
from .conversion_error import ErrorAgainstMos, decompose, error_against, make_label, optimal_values, round_to

LABEL_OF = {"level_onehot": "one_hot", "level_soft": "gaussian_pdf_normalised"}
"""Label that each level formulation teaches: what its softmax can learn of it."""


@dataclass(frozen=True)
class RightAnswers:
    """The images whose most likely level is the right one: what is wrong with their score, conversion did.

    Attributes:
        share: of all images.
        mae, predicted_mae: measured on them, and of an exact network; None if there are none.
    """

    share: float
    mae: float | None
    predicted_mae: float | None


@dataclass(frozen=True)
class MeasuredModel:
    """One network on labelled pictures.

    E[(score - y)^2] = fitting + conversion + cross, with t the score that the network would give if it predicted its
    label exactly: fitting E[(score - t)^2], conversion E[(t - y)^2], cross 2 E[(score - t)(t - y)].

    Attributes:
        levels: number of score or level tokens.
        dtype: number format of the weights.
        images, failed: scored, and left out because they could not be.
        error: of the scores as the network gives them.
        predicted: of t, the conversion error.
        readings: the same probabilities restored in other ways, by name; of the level formulations. `optimal` values
            are fitted to these very images, so they flatter.
        right, leaked_mass, peak: None for score tokens; the last two are the mean probability of words that are no
            level, and of the most likely level.
    """

    name: str
    formulation: str
    levels: int
    dtype: str
    images: int
    failed: int
    error: ErrorAgainstMos
    predicted: ErrorAgainstMos
    fitting_part: float
    conversion_part: float
    cross_term: float
    readings: dict[str, ErrorAgainstMos]
    right: RightAnswers | None
    leaked_mass: float | None
    peak: float | None


class _LevelReader(nn.Module):
    """A metric for `Scorer` that keeps the level probabilities of every image it scores, in order."""

    def __init__(self, metric: QScorer) -> None:
        super().__init__()
        self.metric = metric
        self.images, self.identity = metric.images, metric.identity
        self.shares: list[Tensor] = []  # (B, K) of the whole vocabulary's softmax

    def score_pixels(self, pixel_values: Any) -> Tensor:
        network = self.metric.network
        output = network.score_prompted(pixel_values, self.metric.prompt)
        raw = output.raw_score.float()
        if not bool(raw.isfinite().all()):
            raise QScorerError(f"the model gave scores that are not finite ({raw.tolist()}) in {self.metric.dtype}")
        if network.config.formulation in LABEL_OF:
            shares = output.first_logits.double().softmax(dim=-1)
            self.shares.append(shares[:, network.config.level_token_ids].cpu())
        return raw.clamp(*SCORE_RANGE) if self.metric.clamp else raw


def measure(
    name: str,
    metric: QScorer,
    data: LabelledImages,
    device: str | torch.device | None = None,
    batch_size: int = 16,
    workers: int | None = None,
) -> MeasuredModel:
    """Score labelled pictures, for `level_soft` with spreads, and split the error.

    Raises:
        QScorerError: no picture can be scored, or a spread is missing for `level_soft`.
    """
    config = metric.network.config
    reader = _LevelReader(metric)
    scorer = Scorer(reader, device, batch_size, workers)  # type: ignore[arg-type]  # all that it asks of a metric
    with torch.no_grad():
        scores = scorer.score([image.path for image in data.images], on_error="nan").astype(np.float64)
    scored = np.isfinite(scores)
    if not scored.any():
        raise QScorerError(f"{name} could not score any of the {len(scores)} pictures of {data.name}")
    score = scores[scored]
    chosen = [image for image, kept in zip(data.images, scored, strict=True) if kept]
    mos = np.clip([image.mos for image in chosen], LOW, HIGH)
    levels, dtype = len(config.quality_token_ids), str(metric.dtype).removeprefix("torch.")
    readings: dict[str, ErrorAgainstMos] = {}
    right = leaked = peak = None
    if config.formulation in LABEL_OF:
        label = _label(name, config.formulation, mos, [image.std for image in chosen], levels)
        target = restore(label, level_centers(levels))
        open_set = torch.cat(reader.shares).numpy()
        total = open_set.sum(axis=1, keepdims=True)
        probabilities = open_set / total
        restored = _readings(probabilities, open_set, mos)
        readings = {reading: error_against(values, mos) for reading, values in restored.items()}
        right = _right_answers(probabilities, label, score, target, mos)
        leaked, peak = float(np.mean(1 - total)), float(np.mean(probabilities.max(axis=1)))
    else:
        target = round_to(mos, dtype)
    parts = decompose(mos, target, score)
    return MeasuredModel(
        *(name, config.formulation, levels, dtype, len(score), int((~scored).sum())),
        error=error_against(score, mos),
        predicted=error_against(target, mos),
        fitting_part=parts.restoration_part,
        conversion_part=parts.label_part,
        cross_term=parts.cross_term,
        readings=readings,
        right=right,
        leaked_mass=leaked,
        peak=peak,
    )


def _label(name: str, formulation: str, mos: Floats, std: Sequence[float | None], levels: int) -> Floats:
    missing = sum(spread is None for spread in std)
    if formulation == "level_soft" and missing:
        raise QScorerError(
            f"{name} was taught soft labels, which need the spread of opinions: {missing} of {len(std)} pictures have "
            "none; give --std-column"
        )
    spreads = None if missing else np.array(std, dtype=np.float64)
    return make_label(LABEL_OF[formulation], mos, spreads, levels)


def _readings(probabilities: Floats, open_set: Floats, mos: Floats) -> dict[str, Floats]:
    """Scores (N,) read off the same network in different ways."""
    integers = level_centers(probabilities.shape[1])
    return {
        "integers": restore(probabilities, integers),
        "interval_centers": restore(probabilities, level_centers(len(integers), kind="interval_centers")),
        "optimal": restore(probabilities, optimal_values(probabilities, mos)),
        "most likely level": integers[probabilities.argmax(axis=1)],
        "open set": restore(open_set, integers),
    }


def _right_answers(probabilities: Floats, label: Floats, score: Floats, target: Floats, mos: Floats) -> RightAnswers:
    right = probabilities.argmax(axis=1) == label.argmax(axis=1)
    found, predicted = (float(np.abs(of - mos)[right].mean()) if right.any() else None for of in (score, target))
    return RightAnswers(float(right.mean()), found, predicted)
