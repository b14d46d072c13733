"""Noise of image sensors, and the texture that denoisers take away with it."""

from __future__ import annotations

import cv2
import numpy as np

from .pictures import Picture, from_linear, normal, to_linear

DENOISERS = ("bilateral", "median", "non_local_means", "gaussian_chroma")


def sensor_noise(
    image: Picture, photon: float, read: float, chroma: float, grain: float, light: float, rng: np.random.Generator
) -> Picture:
    """Poisson-Gaussian noise on linear light.

    Args:
        photon: variance of the shot noise at white; it is proportional to the light.
        read: variance of the noise of reading the sensor, the same everywhere.
        chroma: share 0..1 of the noise that differs between R, G and B; the rest is common to them.
        grain: sigma in pixels by which the noise is spread, as after demosaicing or resampling; 0: independent pixels.
        light: the exposure 0..1 of which the picture was amplified back to its brightness; noise grows accordingly.
        rng: source of the noise.
    """
    height, width, _ = image.shape
    exposed = to_linear(image)
    noise = np.sqrt(chroma) * normal(rng, height, width, 3) + np.sqrt(1 - chroma) * normal(rng, height, width, 1)
    if grain > 0:
        noise = cv2.GaussianBlur(noise, (0, 0), grain)
        # Spreading takes variance away; half of it is given back, since grain is also easier to see.
        noise *= 1 / max(float(noise.std()), 0.2) ** 0.5
    variance = photon * exposed / light + read / light**2
    return from_linear(exposed + noise * np.sqrt(variance))


def denoise(image: Picture, method: str, strength: float) -> Picture:
    """One of `DENOISERS`; `strength` 0..1 from hardly any effect to painted-looking areas."""
    if method == "bilateral":
        smooth = image
        for _ in range(1 if strength < 0.5 else 2):
            smooth = cv2.bilateralFilter(smooth, 5, 8 + 100 * strength, 1 + 3 * strength)
        return smooth
    if method == "median":
        smooth = cv2.medianBlur(image, 3 if strength < 0.6 else 5)
        weight = strength / 0.6 if strength < 0.6 else 0.5 + 0.5 * (strength - 0.6) / 0.4
        return cv2.addWeighted(image, 1 - weight, smooth, weight, 0)
    if method == "non_local_means":
        return non_local_means(image, 2 + 22 * strength)
    if method == "gaussian_chroma":
        return chroma_smoothed(image, 0.5 + 4 * strength, 4 + 50 * strength)
    raise ValueError(f"method must be one of {', '.join(DENOISERS)}, got {method!r}")


def non_local_means(image: Picture, filter_strength: float) -> Picture:
    """Lightness and chroma apart, with windows small enough for rendering thousands of pictures."""
    ycc = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
    light = cv2.fastNlMeansDenoising(np.ascontiguousarray(ycc[..., 0]), None, filter_strength, 3, 9)
    chroma = cv2.GaussianBlur(ycc[..., 1:], (0, 0), 0.5 + filter_strength / 10)
    return cv2.cvtColor(np.dstack([light, chroma]), cv2.COLOR_YCrCb2RGB)


def chroma_smoothed(image: Picture, sigma: float, tolerance: float) -> Picture:
    """As cameras do it: chroma blurred much, lightness a little and not over edges."""
    ycc = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
    light = cv2.bilateralFilter(np.ascontiguousarray(ycc[..., 0]), 5, tolerance, 2)
    return cv2.cvtColor(np.dstack([light, cv2.GaussianBlur(ycc[..., 1:], (0, 0), sigma)]), cv2.COLOR_YCrCb2RGB)
