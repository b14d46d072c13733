"""The 25 distortions of KADID-10k at their 5 levels.

Written from the descriptions of

    [1] KADID-10k, Lin et al., QoMEX 2019.

and from the parameter values of public re-implementations. Pictures of the database are 512x384 (W x H). Where [1] used
a tool of its own the result is close, not equal; each such function says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from .codecs import jpeg, jpeg2000
from .optics import defocus, gaussian_blur, motion_blur, sharpen
from .pictures import Picture, check_picture, from_lab, normal, to_lab, to_levels, to_values
from .sensor import non_local_means

Random = np.random.Generator
_AREA = 512 * 384


def _colour_diffusion(image: Picture, amount: float, rng: Random) -> Picture:
    """Chroma spread by a Gaussian and raised by `amount`."""
    lab = to_lab(image)
    sigma = 1.5 * amount + 2
    lab[..., 1:] = amount * cv2.GaussianBlur(lab[..., 1:], (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    return from_lab(lab)


def _colour_shift(image: Picture, amount: float, rng: Random) -> Picture:
    """Green moved by `amount` pixels in a random direction, visible where lightness has edges."""
    angle = rng.uniform(0, 2 * np.pi)
    move = np.array([[1, 0, round(amount * np.cos(angle))], [0, 1, round(amount * np.sin(angle))]], np.float32)
    green = image[..., 1]
    moved = cv2.warpAffine(green, move, green.shape[::-1], flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    edges = np.hypot(cv2.Sobel(gray, -1, 1, 0), cv2.Sobel(gray, -1, 0, 1))
    low, high = np.percentile(edges, (1, 99))
    weight = np.clip((edges - low) / max(high - low, 1e-6), 0, 1)
    # Edges of the moved channel lie beside those of the others; the Sobel filter itself reaches one pixel.
    weight = cv2.dilate(weight, np.ones((2 * round(amount) - 1,) * 2, np.uint8))
    result = image.copy()
    result[..., 1] = np.round(weight * moved + (1 - weight) * green)
    return result


def _colour_quantisation(image: Picture, colours: int, rng: Random) -> Picture:
    picture = Image.fromarray(image)
    # The k-means steps bring median cut near the least squared error; every third pixel tells it enough.
    sample = picture if min(picture.size) < 100 else Image.fromarray(np.ascontiguousarray(image[::3, ::3]))
    palette = sample.quantize(colours, method=Image.Quantize.MEDIANCUT, kmeans=1)
    # Pillow dithers only with a palette that is given.
    return np.array(picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).convert("RGB"))


def _saturation_hsv(image: Picture, factor: float, rng: Random) -> Picture:
    """HSV with S times `factor`: every channel's distance to the largest one is scaled."""
    values = to_values(image)
    largest = values.max(axis=2, keepdims=True)
    return to_levels(largest - factor * (largest - values))


def _saturation_lab(image: Picture, factor: float, rng: Random) -> Picture:
    if factor == 1:
        return image.copy()
    lab = to_lab(image)
    lab[..., 1:] *= factor
    return from_lab(lab)


def _white_noise(image: Picture, variance: float, rng: Random) -> Picture:
    return to_levels(to_values(image) + np.sqrt(variance) * normal(rng, *image.shape))


def _white_noise_ycbcr(image: Picture, variance: float, rng: Random) -> Picture:
    ycc = cv2.cvtColor(to_values(image), cv2.COLOR_RGB2YCrCb)
    noisy = ycc + np.float32(np.sqrt(variance)) * normal(rng, *image.shape)
    return to_levels(cv2.cvtColor(noisy, cv2.COLOR_YCrCb2RGB))


def _impulse_noise(image: Picture, density: float, rng: Random) -> Picture:
    """Salt and pepper, drawn for each channel."""
    draws = rng.random(image.shape, dtype=np.float32)
    result = image.copy()
    result[draws < density / 2] = 0
    result[draws > 1 - density / 2] = 255
    return result


def _denoise(image: Picture, variance: float, rng: Random) -> Picture:
    """Noise, then a denoiser too strong for it, whose own blur grows with the noise.

    [1] used the network DnCNN; this is non-local means and a Gaussian.
    """
    noisy = _white_noise(image, variance, rng)
    strength = variance / 0.001
    return gaussian_blur(non_local_means(noisy, 9.5 * strength**0.7), 0.6 * strength**0.5)


def _curve(image: Picture, middle: float) -> Picture:
    """Lightness through the parabola (0, 0), (0.5, `middle`), (1, 1), clipped."""
    lab = to_lab(image)
    light = lab[..., 0] / 100
    lab[..., 0] = 100 * np.clip(light + 4 * (middle - 0.5) * light * (1 - light), 0, 1)
    return from_lab(lab)


def _jitter(image: Picture, amount: float, rng: Random) -> Picture:
    """Every pixel fetched from a random place near it, five times in a row."""
    height, width, _ = image.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    values = to_values(image)
    for _ in range(5):
        x, y = (places + amount * normal(rng, height, width) for places in (columns, rows))
        values = cv2.remap(values, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return to_levels(values)


def _side(image: Picture, side: int) -> int:
    """`side` pixels of a 512x384 picture, in proportion."""
    height, width, _ = image.shape
    return max(1, min(round(side * (height * width / _AREA) ** 0.5), height, width))


def _non_eccentricity_patches(image: Picture, patches: int, rng: Random) -> Picture:
    """Square patches shown a few pixels from where they belong."""
    height, width, _ = image.shape
    side, reach = _side(image, 8), _side(image, 16)
    result = image.copy()
    for _ in range(patches):
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        angle = rng.uniform(0, 2 * np.pi)
        from_top = int(np.clip(top + round(reach * np.sin(angle)), 0, height - side))
        from_left = int(np.clip(left + round(reach * np.cos(angle)), 0, width - side))
        result[top : top + side, left : left + side] = image[from_top : from_top + side, from_left : from_left + side]
    return result


def _pixelate(image: Picture, strength: float, rng: Random) -> Picture:
    """Sides times 0.95 - strength^0.6 and back, nearest pixels."""
    height, width, _ = image.shape
    scale = 0.95 - strength**0.6
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def _quantisation(image: Picture, levels: int, rng: Random) -> Picture:
    """Each channel on `levels` values of least squared error (Otsu's criterion, found by Lloyd's iterations)."""
    return np.dstack([_least_squares_levels(image[..., channel], levels) for channel in range(3)])


def _least_squares_levels(channel: Picture, levels: int) -> Picture:
    counts = np.bincount(channel.ravel(), minlength=256).astype(np.float64)
    positions = np.arange(256)
    low, high = np.flatnonzero(counts)[[0, -1]]
    centres = low + (np.arange(levels) + 0.5) / levels * (high - low)
    for _ in range(20):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, positions)
        weights = np.bincount(nearest, counts, levels)
        sums = np.bincount(nearest, counts * positions, levels)
        centres = np.where(weights > 0, sums / np.maximum(weights, 1), centres)
    return np.round(centres[nearest]).astype(np.uint8)[channel]


def _colour_blocks(image: Picture, blocks: int, rng: Random) -> Picture:
    height, width, _ = image.shape
    side = _side(image, 32)
    result = image.copy()
    for _ in range(blocks):
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        result[top : top + side, left : left + side] = rng.integers(0, 256, 3)
    return result


def _contrast(image: Picture, amount: float, rng: Random) -> Picture:
    """Values pulled towards mid-gray (`amount` < 0) or pushed away from it on an S-curve with fixed ends."""
    values = to_values(image)
    distance = values - 0.5
    return to_levels(values + amount * distance * (1 - 4 * distance**2 if amount > 0 else 1))


class _Kind(NamedTuple):
    name: str
    parameters: tuple[float, ...]
    apply: Callable[[Picture, Any, Random], Picture]


_KINDS = {
    1: _Kind("Gaussian blur", (0.1, 0.5, 1, 2, 5), lambda image, sigma, rng: gaussian_blur(image, sigma)),
    2: _Kind("lens blur", (1, 2, 4, 6, 8), lambda image, radius, rng: defocus(image, radius)),
    3: _Kind(
        "motion blur", (1, 2, 4, 6, 10), lambda image, length, rng: motion_blur(image, length, rng.uniform(0, 180))
    ),
    4: _Kind("colour diffusion", (1, 3, 6, 8, 12), _colour_diffusion),
    5: _Kind("colour shift", (1, 3, 6, 8, 12), _colour_shift),
    6: _Kind("colour quantization", (64, 48, 32, 16, 8), _colour_quantisation),
    7: _Kind("colour saturation 1", (0.4, 0.2, 0.1, 0, -0.4), _saturation_hsv),
    8: _Kind("colour saturation 2", (1, 2, 3, 6, 9), _saturation_lab),
    9: _Kind("JPEG 2000", (16, 32, 45, 120, 170), lambda image, ratio, rng: jpeg2000(image, ratio)),
    10: _Kind("JPEG", (43, 36, 24, 7, 4), lambda image, quality, rng: jpeg(image, int(quality))),
    11: _Kind("white noise", (0.001, 0.002, 0.003, 0.005, 0.01), _white_noise),
    12: _Kind("white noise in colour (YCbCr)", (0.0001, 0.0005, 0.001, 0.002, 0.003), _white_noise_ycbcr),
    13: _Kind("impulse noise", (0.001, 0.005, 0.01, 0.02, 0.03), _impulse_noise),
    14: _Kind(
        "multiplicative noise",
        (0.001, 0.005, 0.01, 0.02, 0.05),
        lambda image, variance, rng: to_levels(to_values(image) * (1 + np.sqrt(variance) * normal(rng, *image.shape))),
    ),
    15: _Kind("denoise", (0.001, 0.002, 0.003, 0.005, 0.01), _denoise),
    16: _Kind("brighten", (0.1, 0.2, 0.4, 0.7, 1.1), lambda image, amount, rng: _curve(image, 0.5 + amount / 2)),
    17: _Kind("darken", (0.05, 0.1, 0.2, 0.4, 0.8), lambda image, amount, rng: _curve(image, 0.5 - amount / 2)),
    18: _Kind(
        "mean shift", (0.15, 0.08, 0, -0.08, -0.15), lambda image, amount, rng: to_levels(to_values(image) + amount)
    ),
    19: _Kind("jitter", (0.05, 0.1, 0.2, 0.5, 1), _jitter),
    20: _Kind("non-eccentricity patch", (20, 40, 60, 80, 100), _non_eccentricity_patches),
    21: _Kind("pixelate", (0.01, 0.05, 0.1, 0.2, 0.5), _pixelate),
    22: _Kind("quantization", (20, 16, 13, 10, 7), _quantisation),
    23: _Kind("colour block", (2, 4, 6, 8, 10), _colour_blocks),
    24: _Kind("high sharpen", (1, 2, 3, 6, 12), lambda image, amount, rng: sharpen(image, amount, 1)),
    25: _Kind("contrast change", (-0.35, -0.22, -0.1, 0.3, 0.75), _contrast),
}

KADID_TYPES: dict[int, str] = {kind: entry.name for kind, entry in _KINDS.items()}
"""Number of the distortion in KADID-10k, 1..25 -> name."""
KADID_LEVELS = 5


def kadid_distortion(image: Picture, kind: int, level: int, seed: int) -> Picture:
    """A picture distorted as in KADID-10k [1].

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        kind: 1..25, a key of `KADID_TYPES`.
        level: 1 (weakest) .. 5; types 18 and 25 are not ordered so.
        seed: >= 0, of what is random: noise, places, directions. Same arguments, same picture.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: an argument outside its range, or another shape or dtype.
    """
    check_picture(image)
    if kind not in _KINDS:
        raise ValueError(f"kind must be a number of KADID_TYPES, 1..{len(_KINDS)}, got {kind!r}")
    if level not in range(1, KADID_LEVELS + 1):
        raise ValueError(f"level must be 1..{KADID_LEVELS}, got {level!r}")
    entry = _KINDS[kind]
    return entry.apply(image, entry.parameters[level - 1], np.random.default_rng((seed, kind, level)))
