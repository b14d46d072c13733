"""Blur of lenses and of moving cameras, and its opposite: sharpening."""

from __future__ import annotations

import math

import cv2
import numpy as np

from .pictures import Picture, Values, from_lab, to_lab

_SUBSAMPLES = 16


def _normalised(kernel: Values) -> Values:
    return kernel / kernel.sum()


def _filtered(image: Picture, kernel: Values) -> Picture:
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def gaussian_blur(image: Picture, sigma: float) -> Picture:
    """`sigma` in pixels, below 0.2 without effect on levels."""
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)


def disc_kernel(radius: float) -> Values:
    """Share of each pixel that a disc around the middle covers, sum 1."""
    reach = math.ceil(radius)
    size = 2 * reach + 1
    offsets = (np.arange(size * _SUBSAMPLES) + 0.5) / _SUBSAMPLES - size / 2
    inside = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float32)
    return _normalised(inside.reshape(size, _SUBSAMPLES, size, _SUBSAMPLES).mean((1, 3)))


def defocus(image: Picture, radius: float) -> Picture:
    """Blur by a disc, as of a lens out of focus; `radius` in pixels."""
    return _filtered(image, disc_kernel(radius))


def path_kernel(length: float, angle: float, bend: float = 0.0) -> Values:
    """Path of a point while the shutter is open, sum 1.

    Args:
        length: of the path in pixels; up to 1 it is a single point.
        angle: of its middle in degrees.
        bend: by how many degrees the direction turns from one end to the other; 0 is a line.
    """
    steps = max(2, math.ceil(length * _SUBSAMPLES))
    along = np.linspace(-0.5, 0.5, steps)
    directions = np.deg2rad(angle + bend * along)
    stride = max(length - 1, 0) / (steps - 1)
    x, y = np.cumsum(np.cos(directions)) * stride, np.cumsum(np.sin(directions)) * stride
    x, y = x - (x.max() + x.min()) / 2, y - (y.max() + y.min()) / 2
    reach = max(1, math.ceil(max(np.abs(x).max(), np.abs(y).max())))
    kernel = np.zeros((2 * reach + 2, 2 * reach + 2), np.float32)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    for column, share_x in ((left, 1 - (x - left)), (left + 1, x - left)):
        for row, share_y in ((top, 1 - (y - top)), (top + 1, y - top)):
            np.add.at(kernel, (row + reach, column + reach), share_x * share_y)
    return _normalised(kernel[:-1, :-1])


def motion_blur(image: Picture, length: float, angle: float, bend: float = 0.0) -> Picture:
    return _filtered(image, path_kernel(length, angle, bend))


def sharpen(image: Picture, amount: float, radius: float) -> Picture:
    """Unsharp mask on Lab lightness: L + amount (L - blurred L), blurred by a Gaussian of sigma `radius`."""
    lab = to_lab(image)
    light = lab[..., 0]
    blurred = cv2.GaussianBlur(light, (0, 0), radius, borderType=cv2.BORDER_REFLECT_101)
    lab[..., 0] = np.clip(light + amount * (light - blurred), 0, 100)
    return from_lab(lab)
