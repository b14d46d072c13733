"""What the leaderboard asks of a metric. `pyiqa_qscorer.host.pyiqa_metrics` gives pyiqa's in this form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

Mode = Literal["NR", "FR"]


@dataclass(frozen=True)
class MetricDescription:
    """What is known of a metric before it is built.

    Attributes:
        mode: `NR` scores an image, `FR` an image beside its reference.
        lower_better: Small scores mean good quality.
    """

    mode: Mode
    lower_better: bool


@dataclass(frozen=True)
class MetricFacts:
    """What a built metric is made of.

    Attributes:
        identity: Fingerprint of weights and options: equal ones give equal scores up to rounding.
        parameters: Number of them.
        weight_bytes: Parameters and buffers in memory.
        download_bytes: Files of the checkpoint; 0 without one, None where that is not known.
        versions: Of the libraries that make the score.
    """

    identity: str
    parameters: int
    weight_bytes: int
    download_bytes: int | None
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class BenchmarkMetric(Protocol):
    """A built metric."""

    facts: MetricFacts

    def prepare(self, picture: Image.Image) -> Tensor:
        """(C, H, W) input of an RGB picture; runs in threads. Inputs of one shape may share a batch."""
        ...

    def score(self, images: Tensor, references: Tensor | None) -> list[float]:
        """Score of each of (B, C, H, W) inputs, as the metric gives it. Raises whatever the metric raises."""
        ...


class Metrics(Protocol):
    """All metrics there are."""

    def describe(self, name: str) -> MetricDescription:
        """Raises `QScorerError` with the nearest names where there is no such metric."""
        ...

    def build(self, name: str, device: torch.device, options: dict[str, Any]) -> BenchmarkMetric:
        """Raises whatever building raises: a missing library, a failed download, an unknown option."""
        ...


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Memory of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
