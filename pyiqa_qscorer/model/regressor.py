"""Score regressor: a small MLP from the decoder's hidden state to one number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RegressorBlock(nn.Module):
    """relu(linear(x)), plus x where the width does not change (after the activation, as published)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.residual = in_features == out_features

    def forward(self, states: Tensor) -> Tensor:
        output = torch.relu(self.linear(states))
        return output + states if self.residual else output


class ScoreRegressor(nn.Module):
    """(..., width) hidden states -> (...) raw scores, unclamped."""

    def __init__(self, width: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        sizes = [width, *hidden_sizes]
        self.model = nn.Sequential(
            *(RegressorBlock(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        )
        self.output_layer = nn.Linear(sizes[-1], 1)

    def forward(self, states: Tensor) -> Tensor:
        return self.output_layer(self.model(states)).squeeze(-1)
