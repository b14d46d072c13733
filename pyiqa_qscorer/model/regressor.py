"""Score regressor: a small MLP from the decoder's hidden state to one number."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

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
    """The published regressor: (B, width) states -> (B,) raw scores, unclamped; any leading axes."""

    def __init__(self, width: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        sizes = [width, *hidden_sizes]
        self.model = nn.Sequential(*(RegressorBlock(*in_out) for in_out in pairwise(sizes)))
        self.output_layer = nn.Linear(sizes[-1], 1)

    @property
    def last_layer(self) -> nn.Linear:
        """Its bias is added to every score."""
        return self.output_layer

    def forward(self, states: Tensor, visual_tokens: Tensor | None = None) -> Tensor:
        """`visual_tokens` are ignored; they are there so that both regressors are called alike."""
        return self.output_layer(self.model(states)).squeeze(-1)


class HyperRegressor(nn.Module):
    """Regressor whose weights come from the image's visual tokens (idea of HyperIQA, Su et al., CVPR 2020).

    A shared layer narrows the state to `hidden_sizes[0]`; the layers after it, down to one number, get their weights
    and biases per image, by linear maps of the mean visual token.
    """

    def __init__(self, width: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = [*hidden_sizes, 1]
        self.narrow = nn.Linear(width, self.sizes[0])
        self.weights = nn.ModuleList(nn.Linear(width, a * b) for a, b in pairwise(self.sizes))
        self.biases = nn.ModuleList(nn.Linear(width, b) for b in self.sizes[1:])

    @property
    def last_layer(self) -> nn.Linear:
        """Its bias is added to every score."""
        return cast(nn.Linear, self.biases[-1])

    def forward(self, states: Tensor, visual_tokens: Tensor) -> Tensor:
        """(B, width) states and (B, V, width) visual tokens -> (B,) raw scores, unclamped."""
        content = visual_tokens.mean(dim=1)
        hidden = torch.relu(self.narrow(states))
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            matrix = weight(content).unflatten(-1, (self.sizes[index + 1], self.sizes[index]))
            hidden = torch.einsum("boi,bi->bo", matrix, hidden) + bias(content)
            if index + 2 < len(self.sizes):
                hidden = torch.relu(hidden)
        return hidden.squeeze(-1)
