"""Encoding and decoding: still codecs of Pillow, video codecs of FFmpeg through PyAV."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image, features

from .pictures import Picture, padded

VIDEO_CODECS = {"h264": ("libx264", "h264"), "mpeg4": ("mpeg4", "mpeg4"), "mpeg2": ("mpeg2video", "mpeg2video")}
"""Name -> FFmpeg's encoder and decoder."""
_MACROBLOCK = 16


def codec_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a distorted picture looks like, beside Pillow and NumPy."""
    inside_pillow = {"libjpeg": "jpg", "libwebp": "webp", "libavif": "avif", "openjpeg": "jpg_2000"}
    found = {name: str(features.version(feature)) for name, feature in inside_pillow.items()}
    return {**found, "av": av.__version__, "opencv": cv2.__version__}


def _through(image: Picture, file_format: str, **options: Any) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, file_format, **options)
    return np.array(Image.open(buffer).convert("RGB"))


def jpeg(image: Picture, quality: int, subsampling: str = "4:2:0") -> Picture:
    """`quality` 1..100 (libjpeg), `subsampling` of the chroma "4:4:4", "4:2:2" or "4:2:0"."""
    return _through(image, "JPEG", quality=quality, subsampling=subsampling)


def webp(image: Picture, quality: int) -> Picture:
    """Lossy WebP (VP8 intra frame), `quality` 0..100."""
    return _through(image, "WEBP", quality=quality, method=2)


def avif(image: Picture, quality: int) -> Picture:
    """AVIF (AV1 intra frame), `quality` 0..100."""
    return _through(image, "AVIF", quality=quality, speed=9, max_threads=1)


def jpeg2000(image: Picture, ratio: float) -> Picture:
    """Irreversible wavelet coding to 1 / `ratio` of the raw size, `ratio` >= 1."""
    resolutions = min(6, 1 + int(math.log2(min(image.shape[:2]))))
    options = {"quality_mode": "rates", "quality_layers": [ratio], "num_resolutions": resolutions}
    return _through(image, "JPEG2000", **options, irreversible=True, mct=1, no_jp2=True)


STILL_CODECS: dict[str, Callable[[Picture, int], Picture]] = {"jpeg": jpeg, "webp": webp, "avif": avif}


def still(image: Picture, codec: str, quality: int) -> Picture:
    """One of `STILL_CODECS`."""
    if codec not in STILL_CODECS:
        raise ValueError(f"codec must be one of {', '.join(STILL_CODECS)}, got {codec!r}")
    return STILL_CODECS[codec](image, quality)


def video(image: Picture, codec: str, quantiser: int, motion: Sequence[int] | None = None) -> Picture:
    """A frame of a video at a fixed quantiser.

    Args:
        image: (H, W, 3); padded to whole macroblocks and cut again.
        codec: one of `VIDEO_CODECS`.
        quantiser: 0..51 for h264, 1..31 for the others.
        motion: None for an intra frame; (dy, dx) for a frame predicted from one that showed the scene shifted so.
    """
    if codec not in VIDEO_CODECS:
        raise ValueError(f"codec must be one of {', '.join(VIDEO_CODECS)}, got {codec!r}")
    height, width, _ = image.shape
    frame = padded(image, 0, -height % _MACROBLOCK, 0, -width % _MACROBLOCK)
    frames = [frame] if motion is None else [np.roll(frame, tuple(motion), (0, 1)), frame]
    return np.ascontiguousarray(_video_frames(frames, codec, quantiser)[-1][:height, :width])


def _video_frames(frames: list[Picture], codec: str, quantiser: int) -> list[Picture]:
    encoder_name, decoder_name = VIDEO_CODECS[codec]
    encoder: Any = av.CodecContext.create(encoder_name, "w")
    encoder.height, encoder.width = frames[0].shape[:2]
    encoder.pix_fmt = "yuv420p"
    encoder.framerate = 25
    encoder.thread_count = 1
    if codec == "h264":
        encoder.options = {"qp": str(quantiser), "preset": "veryfast", "tune": "zerolatency"}
    else:
        encoder.options = {"qmin": str(quantiser), "qmax": str(quantiser)}
        encoder.max_b_frames = 0
    packets = []
    for index, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
        picture.pts = index
        packets += encoder.encode(picture)
    packets += encoder.encode(None)
    decoder: Any = av.CodecContext.create(decoder_name, "r")
    decoder.thread_count = 1
    if encoder.extradata:
        decoder.extradata = encoder.extradata
    decoded = [picture for packet in packets for picture in decoder.decode(packet)] + decoder.decode(None)
    if len(decoded) != len(frames):
        raise RuntimeError(f"{codec} gave {len(decoded)} of {len(frames)} frames back; check the installed PyAV")
    return [picture.to_ndarray(format="rgb24") for picture in decoded]
