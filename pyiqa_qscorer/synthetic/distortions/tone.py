"""Brightness, contrast and colour, and too few levels of them."""

from __future__ import annotations

import cv2
import numpy as np

from .pictures import Picture, from_linear, to_levels, to_linear

BANDING_SPACES = ("rgb", "lightness")


def tone(
    image: Picture, exposure: float = 0.0, contrast: float = 1.0, gamma: float = 1.0, saturation: float = 1.0
) -> Picture:
    """A camera's or an editor's settings, one after the other.

    Args:
        exposure: in stops, on linear light; highlights clip.
        contrast: slope at mid-gray of a curve with fixed ends.
        gamma: exponent on [0, 1]; above 1 darkens the middle.
        saturation: factor of the distance from gray.
    """
    if exposure:
        image = from_linear(to_linear(image) * np.float32(2.0**exposure))
    curve = np.linspace(0, 1, 256) ** gamma
    below = 0.5 * (2 * np.minimum(curve, 1 - curve)) ** contrast
    curve = np.where(curve < 0.5, below, 1 - below)
    image = np.round(curve * 255).astype(np.uint8)[image]
    if saturation != 1:
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None]
        image = to_levels((gray + np.float32(saturation) * (image - gray)) / 255)
    return image


def banding(image: Picture, levels: int, space: str) -> Picture:
    """Rounded to `levels` >= 2 evenly spaced values, each channel ("rgb") or only the "lightness" (Y of YCrCb)."""
    if space not in BANDING_SPACES:
        raise ValueError(f"space must be one of {', '.join(BANDING_SPACES)}, got {space!r}")
    steps = np.round(np.round(np.arange(256) / 255 * (levels - 1)) / (levels - 1) * 255).astype(np.uint8)
    if space == "rgb":
        return steps[image]
    ycc = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
    ycc[..., 0] = steps[ycc[..., 0]]
    return cv2.cvtColor(ycc, cv2.COLOR_YCrCb2RGB)
