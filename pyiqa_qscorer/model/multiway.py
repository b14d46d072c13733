"""Modality-adaptive module: one copy for text tokens, one for visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class VisualSpan(NamedTuple):
    """Where the visual tokens stand in a sequence: columns start..stop-1, the same in every row."""

    start: int
    stop: int

    def from_column(self, column: int) -> VisualSpan:
        """The same tokens in a sequence that starts at `column` of this one."""
        return VisualSpan(max(self.start - column, 0), max(self.stop - column, 0))


NO_VISUAL = VisualSpan(0, 0)


class Multiway(nn.Module):
    """Applies `multiway[1]` to the visual span of (B, T, width) and `multiway[0]` to the text around it.

    The published code gathers tokens by an indicator; because the visual tokens are one block, slices give the same
    numbers without a synchronisation of the device.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(self, states: Tensor, visual: VisualSpan) -> Tensor:
        text, image = self.multiway
        start, stop = visual
        if start == stop:
            return text(states)
        parts = [image(states[:, start:stop])]
        if start > 0:
            parts.insert(0, text(states[:, :start]))
        if stop < states.shape[1]:
            parts.append(text(states[:, stop:]))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
