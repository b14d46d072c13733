"""pyiqa's full-reference metrics as a function of two pictures, for the labels of synthetic training data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class ReferenceMetrics:
    """(distorted, reference) uint8 (H, W, 3) RGB -> value of each metric by name, on the CPU.

    Args:
        names: pyiqa's full-reference metrics. Those with trained weights, such as lpips, download them at the first
            call; formulas, such as gmsd and psnry, do not.

    Can be sent to another process: the metrics are made at the first call.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._metrics: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "_metrics": {}}

    def __call__(self, distorted: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        if not self._metrics:
            import pyiqa

            self._metrics = {name: pyiqa.create_metric(name, device="cpu") for name in self.names}
        images = [torch.tensor(image).permute(2, 0, 1)[None].float() / 255 for image in (distorted, reference)]
        with torch.no_grad():
            return {name: float(metric(*images)) for name, metric in self._metrics.items()}
