"""Smaller and back again."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .pictures import Picture

KERNELS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
}
"""As Pillow has them: all but `nearest` widen when shrinking and do not alias; `area` repeats pixels when growing."""


def _resized(image: Picture, height: int, width: int, kernel: str) -> Picture:
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    return np.array(Image.fromarray(image).resize((width, height), KERNELS[kernel]))


def shrunk(image: Picture, factor: float, kernel: str) -> Picture:
    """Sides divided by `factor` >= 1, at least one pixel each."""
    height, width, _ = image.shape
    return _resized(image, max(1, round(height / factor)), max(1, round(width / factor)), kernel)


def grown(image: Picture, height: int, width: int, kernel: str) -> Picture:
    return _resized(image, height, width, kernel)


def resample(image: Picture, factor: float, down: str, up: str) -> Picture:
    """Shrunk with the kernel `down`, then grown to the same size with `up`."""
    height, width, _ = image.shape
    return grown(shrunk(image, factor, down), height, width, up)
