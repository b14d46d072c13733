"""The kinds of steps of a chain: how strength becomes parameters, and what they do to a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import codecs, tone
from .optics import defocus, gaussian_blur, motion_blur, sharpen
from .pictures import Picture, padded
from .resampling import grown, resample, shrunk
from .sensor import DENOISERS, denoise, sensor_noise

Parameters = dict[str, Any]
Random = np.random.Generator

_DOWN = ("bilinear", "bicubic", "lanczos", "area", "area", "nearest")
_UP = ("bilinear", "bicubic", "bicubic", "lanczos", "nearest")
_SUBSAMPLING = ("4:2:0", "4:2:0", "4:4:4")


@dataclass(frozen=True)
class StepKind:
    """One kind of step.

    Attributes:
        draw: strength 0..1 and randomness -> parameters, JSON-serialisable. The strength sets how severe the step is
            on average; directions, kernels, codecs and the like are drawn, some of which matter as well.
        apply: picture, parameters, randomness (of the noise) -> picture of the same size.
    """

    draw: Callable[[float, Random], Parameters]
    apply: Callable[[Picture, Parameters, Random], Picture]


def _plain(draw: Callable[[float, Random], Parameters], apply: Callable[..., Picture]) -> StepKind:
    """A kind whose parameters are the keyword arguments of a function of the picture."""
    return StepKind(draw, lambda image, parameters, rng: apply(image, **parameters))


def _between(weak: float, strong: float, strength: float, power: float = 1.0) -> float:
    """`weak` at strength 0, `strong` at 1; a power above 1 keeps it weak for longer."""
    return round(weak + (strong - weak) * strength**power, 4)


def _geometric(weak: float, strong: float, strength: float) -> float:
    return round(float(weak * (strong / weak) ** strength), 6)


def _choice(rng: Random, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _uniform(rng: Random, low: float, high: float) -> float:
    return round(float(rng.uniform(low, high)), 2)


def _draw_motion(strength: float, rng: Random) -> Parameters:
    bend = _uniform(rng, -120, 120) if rng.random() < 0.5 else 0.0
    return {"length": _between(1.5, 24, strength, 1.5), "angle": _uniform(rng, 0, 180), "bend": bend}


def _draw_noise(strength: float, rng: Random) -> Parameters:
    return {
        "photon": _geometric(3e-5, 1.5e-2, strength),
        "read": _geometric(1e-7, 2e-4, strength),
        "chroma": _uniform(rng, 0.2, 1),
        "grain": _uniform(rng, 0.4, 0.9) if rng.random() < 0.4 else 0.0,
        "light": 1.0,
    }


def _draw_low_light(strength: float, rng: Random) -> Parameters:
    return {
        **_draw_noise(0.15, rng),
        "light": _geometric(0.5, 0.02, strength),
        "exposure": round(-1.5 * strength * float(rng.uniform(0.4, 1)), 3),
    }


def _low_light(image: Picture, parameters: Parameters, rng: Random) -> Picture:
    """Noise of a short exposure, only in part amplified back to the right brightness."""
    sensor = {name: value for name, value in parameters.items() if name != "exposure"}
    return tone.tone(sensor_noise(image, **sensor, rng=rng), exposure=parameters["exposure"])


def _draw_tone(strength: float, rng: Random) -> Parameters:
    stops, *shares = (float(share) for share in rng.uniform(-1, 1, 4) * strength)
    factors = {"contrast": 0.6, "gamma": 0.6, "saturation": 0.8}
    drawn = {name: round(2 ** (most * share), 3) for (name, most), share in zip(factors.items(), shares, strict=True)}
    return {"exposure": round(stops, 3), **drawn}


def _draw_resample(strength: float, rng: Random) -> Parameters:
    return {"factor": _geometric(1.02, 8, strength), "down": _choice(rng, _DOWN), "up": _choice(rng, _UP)}


def _draw_upscaler(strength: float, rng: Random) -> Parameters:
    return {
        "factor": _geometric(1.05, 5, strength),
        "down": _choice(rng, _DOWN[:-1]),
        "smooth": _uniform(rng, 0, 0.5),
        "amount": _between(0.2, float(rng.uniform(1.5, 3)), strength, 0.5),
    }


def _upscaler(image: Picture, parameters: Parameters, rng: Random) -> Picture:
    """Enlarged, smoothed and over-sharpened: crisp edges without texture, as of learned upscalers."""
    result = resample(image, parameters["factor"], parameters["down"], "lanczos")
    result = denoise(result, "bilateral", parameters["smooth"])
    return sharpen(result, parameters["amount"], 0.5 * parameters["factor"])


_QUALITIES = {"jpeg": (96, 4, 0.6), "webp": (95, 0, 0.7), "avif": (85, 8, 0.7)}
"""Quality at strength 0, at 1, and the power between."""


def _quality(codec: str, strength: float) -> int:
    weak, strong, power = _QUALITIES[codec]
    return round(_between(weak, strong, strength, power))


def _draw_jpeg(strength: float, rng: Random) -> Parameters:
    return {"quality": _quality("jpeg", strength), "subsampling": _choice(rng, _SUBSAMPLING)}


def _draw_video(strength: float, rng: Random) -> Parameters:
    codec = _choice(rng, ("h264", "h264", "mpeg4", "mpeg2"))
    quantiser = round(_between(16, 50, strength) if codec == "h264" else _between(2, 31, strength, 1.3))
    motion = None if rng.random() < 0.4 else [int(shift) for shift in rng.integers(-6, 7, 2)]
    return {"codec": codec, "quantiser": quantiser, "motion": motion, "shift": _draw_shift(rng)}


def _draw_shift(rng: Random) -> list[int]:
    return [int(shift) for shift in rng.integers(0, 8, 2)]


def _shifted(image: Picture, shift: list[int], code: Callable[[Picture], Picture]) -> Picture:
    """Coded with its grid of blocks moved by `shift` (down, right), as after a crop."""
    height, width, _ = image.shape
    down, right = shift
    return code(padded(image, down, 0, right, 0))[down : down + height, right : right + width]


def _video(image: Picture, parameters: Parameters, rng: Random) -> Picture:
    coding = {name: value for name, value in parameters.items() if name != "shift"}
    return _shifted(image, parameters["shift"], lambda picture: codecs.video(picture, **coding))


def _draw_still(strength: float, rng: Random) -> Parameters:
    codec = _choice(rng, ("jpeg", "jpeg", "webp", "avif"))
    return {"codec": codec, "quality": _quality(codec, strength)}


def _draw_recompress(strength: float, rng: Random) -> Parameters:
    first, second = _draw_still(strength, rng), _draw_still(0.85 * strength, rng)
    return {"first": first, "second": second, "shift": _draw_shift(rng)}


def _recompress(image: Picture, parameters: Parameters, rng: Random) -> Picture:
    once = codecs.still(image, **parameters["first"])
    return _shifted(once, parameters["shift"], lambda picture: codecs.still(picture, **parameters["second"]))


def _draw_compress_small(strength: float, rng: Random) -> Parameters:
    kernels = {"down": _choice(rng, _DOWN), "up": _choice(rng, _UP)}
    return {"factor": _geometric(1.05, 5, strength), **kernels, **_draw_still(0.8 * strength, rng)}


def _compress_small(image: Picture, parameters: Parameters, rng: Random) -> Picture:
    height, width, _ = image.shape
    small = shrunk(image, parameters["factor"], parameters["down"])
    small = codecs.still(small, parameters["codec"], parameters["quality"])
    return grown(small, height, width, parameters["up"])


STEP_KINDS: dict[str, StepKind] = {
    "gaussian_blur": _plain(lambda strength, rng: {"sigma": _geometric(0.3, 5, strength)}, gaussian_blur),
    "defocus": _plain(lambda strength, rng: {"radius": _geometric(0.5, 8, strength)}, defocus),
    "motion_blur": _plain(_draw_motion, motion_blur),
    "tone": _plain(_draw_tone, tone.tone),
    "low_light": StepKind(_draw_low_light, _low_light),
    "sensor_noise": StepKind(_draw_noise, lambda image, parameters, rng: sensor_noise(image, **parameters, rng=rng)),
    "denoise": _plain(
        lambda strength, rng: {"method": _choice(rng, DENOISERS), "strength": round(strength, 4)}, denoise
    ),
    "sharpen": _plain(
        lambda strength, rng: {"amount": _geometric(0.15, 6, strength), "radius": _uniform(rng, 0.7, 2.5)}, sharpen
    ),
    "banding": _plain(
        lambda strength, rng: {
            "levels": round(_geometric(64, 5, strength)),
            "space": _choice(rng, tone.BANDING_SPACES),
        },
        tone.banding,
    ),
    "resample": _plain(_draw_resample, resample),
    "upscaler": StepKind(_draw_upscaler, _upscaler),
    "jpeg": _plain(_draw_jpeg, codecs.jpeg),
    "webp": _plain(lambda strength, rng: {"quality": _quality("webp", strength)}, codecs.webp),
    "avif": _plain(lambda strength, rng: {"quality": _quality("avif", strength)}, codecs.avif),
    "jpeg2000": _plain(lambda strength, rng: {"ratio": _geometric(6, 250, strength)}, codecs.jpeg2000),
    "video": StepKind(_draw_video, _video),
    "recompress": StepKind(_draw_recompress, _recompress),
    "compress_small": StepKind(_draw_compress_small, _compress_small),
}
