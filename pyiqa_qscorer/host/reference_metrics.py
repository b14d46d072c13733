"""pyiqa's full-reference metrics as a function of two pictures, for the labels of synthetic training data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np


def compare(distorted: np.ndarray, reference: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Value of each metric by name, computed on the CPU.

    Args:
        distorted, reference: uint8 (H, W, 3) RGB.
        names: pyiqa's full-reference metrics. Those with trained weights, such as lpips, download them at the first
            call; formulas, such as gmsd and psnry, do not.
    """
    import torch  # takes seconds, and rendering of sets with known opinions needs none of it

    images = [torch.tensor(image).permute(2, 0, 1)[None].float() / 255 for image in (distorted, reference)]
    with torch.no_grad():
        return {name: float(_metric(name)(*images)) for name in names}


@functools.cache
def _metric(name: str) -> Any:
    import pyiqa

    return pyiqa.create_metric(name, device="cpu")
