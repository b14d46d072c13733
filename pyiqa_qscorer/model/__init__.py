"""The Q-Scorer network: vision encoder, visual abstractor, modality-adaptive decoder, regressor.

Once this is imported, transformers' `AutoConfig` and `AutoModel` know model type `qscorer`:

    >>> from transformers import AutoModel
    >>> from pyiqa_qscorer.registry import MINI_CHECKPOINT
    >>> type(AutoModel.from_pretrained(MINI_CHECKPOINT)).__name__
    'QScorerForScoring'
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel

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

AutoConfig.register(QScorerConfig.model_type, QScorerConfig, exist_ok=True)
AutoModel.register(QScorerConfig, QScorerForScoring, exist_ok=True)
