"""What all distortions share: checked input, conversions between levels, [0, 1] and linear light."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[Any]
"""(H, W, 3) uint8 RGB levels. OpenCV's types do not know dtypes, so neither do these."""
Values = NDArray[Any]
"""float32, [0, 1] unless said otherwise."""

_LINEAR_STEPS = 1 << 16
_LEVELS, _LIGHT = np.linspace(0, 1, 256), np.linspace(0, 1, _LINEAR_STEPS)
_TO_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4).astype(np.float32)
_CURVE = np.where(_LIGHT <= 0.0031308, _LIGHT * 12.92, 1.055 * _LIGHT ** (1 / 2.4) - 0.055)
_FROM_LINEAR = np.round(_CURVE * 255).astype(np.uint8)


def check_picture(image: Picture) -> None:
    """Raises ValueError unless `image` is a uint8 array (H, W, 3) with at least one pixel."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image must be a uint8 array, got {found}; round levels of 0..255 to uint8 first")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image must be (H, W, 3) RGB, got {image.shape}; repeat a gray picture three times")


def to_values(image: Picture) -> Values:
    return image.astype(np.float32) / np.float32(255)


def to_levels(values: Values) -> Picture:
    """[0, 1] to the nearest levels; what lies outside is clipped."""
    return np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)


def to_linear(image: Picture) -> Values:
    """sRGB levels to linear light in [0, 1] (IEC 61966-2-1)."""
    return _TO_LINEAR[image]


def from_linear(light: Values) -> Picture:
    """Linear light to sRGB levels; what lies outside [0, 1] is clipped."""
    return _FROM_LINEAR[(np.clip(light, 0, 1) * (_LINEAR_STEPS - 1) + 0.5).astype(np.uint16)]


def to_lab(image: Picture) -> Values:
    """CIE Lab: L in 0..100, a and b about -128..127."""
    return cv2.cvtColor(to_values(image), cv2.COLOR_RGB2Lab)


def from_lab(lab: Values) -> Picture:
    return to_levels(cv2.cvtColor(lab, cv2.COLOR_Lab2RGB))


def normal(rng: np.random.Generator, *shape: int) -> Values:
    """Standard normal noise."""
    return rng.standard_normal(shape, dtype=np.float32)


def padded(image: Picture, top: int, bottom: int, left: int, right: int) -> Picture:
    """Edge pixels repeated outwards: defined for every size, unlike a mirror."""
    return cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REPLICATE)
