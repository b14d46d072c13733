"""What everything above the networks asks of one, whatever backbone it stands on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .regressor import HyperRegressor, ScoreRegressor

if TYPE_CHECKING:
    from .qscorer import QScorerOutput, ScoreOutput

IGNORED_LABEL = -100  # of a token that the cross entropy leaves out


class QualityConfig(Protocol):
    """How a network tells the quality."""

    formulation: str  # see `QScorerConfig`
    prompt: str  # name or text of the question, for scoring
    training_data: Any  # for reports

    @property
    def quality_token_ids(self) -> Sequence[int]:
        """Of the score tokens or level words, lowest quality first."""


class ScoringNetwork(Protocol):
    """A Q-Scorer: prompt and image in; logits and hidden state where the answer names the quality out.

    `QScorerForScoring` is the published network; `vlm.VlmQScorer` any image-text-to-text model of transformers. Both
    are modules with `deepmlp`, the regressor.
    """

    config: Any  # a QualityConfig

    def __call__(self, **inputs: Any) -> QScorerOutput:
        """Teacher-forced pass of what the network's collator makes, `labels` among it."""

    def score_prompted(self, images: Any, prompt: Any, prefix: Any = None) -> ScoreOutput:
        """Scores of a batch by greedy decoding after the prompt.

        Args:
            images: what the network's `ModelImages` make of a batch.
            prompt: of the network's kind.
            prefix: `read_prefix(prompt)` of the same weights, or None.
        """

    def score_collated(self, batch: Any, prompt: Any) -> ScoreOutput:
        """The same of a batch of the network's collator, without the opinions."""

    def read_prefix(self, prompt: Any) -> Any:
        """What the network can read of the prompt before it sees an image, None if there is nothing."""


def make_regressor(kind: str, width: int, hidden_sizes: Sequence[int]) -> ScoreRegressor | HyperRegressor:
    """`mlp` or `hyper`, from states of `width`, with random weights."""
    return (HyperRegressor if kind == "hyper" else ScoreRegressor)(width, hidden_sizes)


def read_quality(
    formulation: str, level_ids: Sequence[int], regressor: nn.Module, states: Tensor, logits: Tensor, visual: Tensor
) -> Tensor:
    """Unclamped scores (N,) at the positions that predict a quality token.

    Args:
        states: (N, width) hidden states there.
        logits: (N, vocab_size) there.
        visual: (N, V, width) visual tokens of the image, for a hyper-network.
    """
    if formulation == "score_token":
        scores: Tensor = regressor(states, visual)
        return scores
    return expected_level(logits[:, list(level_ids)])


def expected_level(logits: Tensor) -> Tensor:
    """(..., K) logits of the level tokens, lowest first -> (...) float32 expectation of K equal steps from 1 to 5.

    The score restoration of Q-Align and DeQA-Score: softmax over the level tokens only.
    """
    values = torch.linspace(1, 5, logits.shape[-1], device=logits.device)
    return logits.float().softmax(dim=-1) @ values


def next_token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log softmax(logits[:, t])[labels[:, t + 1]] over all supervised labels of the batch, as published.

    Computed and returned in the dtype of `logits`, as published (bfloat16 in its training).

    Args:
        logits: (B, T, V).
        labels: (B, T) int64, `IGNORED_LABEL` where not supervised.

    Raises:
        ValueError: shapes that do not fit, or no supervised label (the published code returns NaN).
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        found = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"logits must be (B, T, V) and labels (B, T), got {found}")
    rows, positions = (labels[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
    if not len(rows):
        raise ValueError(
            f"labels must supervise at least one token, all are {IGNORED_LABEL}; "
            "check that the answer is not cut off and its tokens are labelled"
        )
    # Supervised rows first: the vocabulary is large and few positions of a text are supervised.
    return F.cross_entropy(logits[rows, positions], labels[rows, positions + 1])
