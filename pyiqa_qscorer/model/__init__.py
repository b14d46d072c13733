"""The Q-Scorer network: vision encoder, visual abstractor, modality-adaptive decoder, regressor."""

from __future__ import annotations

from .configuration import QScorerAbstractorConfig, QScorerConfig, QScorerVisionConfig
from .qscorer import QScorerForScoring, QScorerOutput, ScoreOutput

__all__ = [
    "QScorerAbstractorConfig",
    "QScorerConfig",
    "QScorerForScoring",
    "QScorerOutput",
    "QScorerVisionConfig",
    "ScoreOutput",
]
