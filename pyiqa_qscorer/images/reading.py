"""Reading images: files, bytes and PIL images of any kind become 8-bit RGB pictures, or an error with its reason."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator

from PIL import Image, ImageFile, UnidentifiedImageError

from ..errors import ImageError

#: Longest side that is accepted, the longest that JPEG can hold: the work can grow with its square.
MAX_SIDE = 65_535


def open_image(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """Read an image completely and return it in mode RGB.

    `source` is a path, the bytes of an image file, or a PIL image (not changed, and returned itself if it already is
    RGB). The conversion is Pillow's `convert("RGB")`, as published: alpha is dropped, not composited; gray is repeated;
    palette, CMYK and other colours are converted without colour profile; 16-bit colour files arrive from Pillow with
    their upper 8 bits. EXIF rotation is not applied. Of an animation the first frame is taken, of a PIL image the frame
    it is at.

    Raises `ImageError` for a missing, unreadable, empty, truncated, corrupt or non-image file; for more pixels than PIL
    allows (twice `PIL.Image.MAX_IMAGE_PIXELS`; from once the limit on PIL warns); for a side of 0 or above `MAX_SIDE`;
    and for the gray modes of more than 8 bits (`I;16`, `I`, `F`): Pillow clips those at 255, which turns an ordinary
    16-bit photo white, and any other conversion would give another score than the published one.
    """
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        name = f"PIL image {os.fspath(filename)!r}" if filename else "PIL image"
        with _failures_as_image_error(name), _truncated_files_fail():
            source.load()
            return _to_rgb(source, name)
    if isinstance(source, bytes):
        name = f"image given as {len(source)} bytes"
        if not source:
            raise ImageError(f"{name}: it is empty; pass the content of an image file.")
        return _decode(io.BytesIO(source), name)
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        name = f"image {path!r}"
        _check_file(path, name)
        return _decode(path, name)
    raise ImageError(
        "source must be a path, the bytes of an image file, or a PIL image, "
        f"got {type(source).__name__}; score tensors with the metric or Scorer."
    )


def _check_file(path: str, name: str) -> None:
    if os.path.isdir(path):
        raise ImageError(f"{name}: it is a folder; pass the image files in it.")
    if not os.path.exists(path):
        if "://" in path:
            raise ImageError(f"{name}: URLs are not fetched; download it and pass the file.")
        raise ImageError(f"{name}: there is no such file in {os.getcwd()!r}; check the path.")
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise ImageError(f"{name}: it is not a regular file; pass an image file or its bytes.")
    if not os.access(path, os.R_OK):
        raise ImageError(f"{name}: there is no permission to read it; change its permissions.")
    if os.path.getsize(path) == 0:
        raise ImageError(f"{name}: the file is empty (0 bytes); copy or download it again.")


def _decode(file: str | io.BytesIO, name: str) -> Image.Image:
    with _failures_as_image_error(name), _truncated_files_fail(), Image.open(file) as image:
        image.load()
        return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    check_sides(*image.size, name)
    if image.mode == "F" or image.mode.startswith("I"):
        raise ImageError(
            f"{name}: mode {image.mode!r} has more than 8 bits per value, and Pillow's conversion "
            "to RGB would clip every value above 255 to white. Convert it to 8 bits first, "
            "16-bit gray for example with "
            "PIL.Image.fromarray((numpy.asarray(image) / 257).round().astype('uint8'))."
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def check_sides(width: int, height: int, name: str) -> None:
    if min(width, height) < 1 or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name}: its size is {width}x{height}, each side must be 1 to {MAX_SIDE} pixels; "
            "crop or downscale it first."
        )


@contextlib.contextmanager
def _failures_as_image_error(name: str) -> Iterator[None]:
    """Turn whatever PIL raises into an `ImageError` that names the image."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: {error} If you trust it, raise PIL.Image.MAX_IMAGE_PIXELS.") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: it is not an image that Pillow can read, or its first bytes are damaged; "
            "convert it to PNG or copy it again."
        ) from error
    except MemoryError as error:
        raise ImageError(f"{name}: not enough memory to decode it; downscale it first.") from error
    except Exception as error:  # PIL's decoders raise nearly every built-in type on damaged files
        raise ImageError(
            f"{name}: it cannot be decoded ({type(error).__name__}: {error}); it may be truncated "
            "or corrupt, copy or download it again."
        ) from error


_decoding = threading.Lock()
_decoding_count = 0
_tolerant_before = False


@contextlib.contextmanager
def _truncated_files_fail() -> Iterator[None]:
    """Keep PIL's process-wide LOAD_TRUNCATED_IMAGES off while any thread of ours decodes.

    Importing pyiqa's AVA dataset switches it on for good; the missing part of a truncated file
    would then be filled with gray and scored without a word.
    """
    global _decoding_count, _tolerant_before
    with _decoding:
        if _decoding_count == 0:
            _tolerant_before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _decoding_count += 1
    try:
        yield
    finally:
        with _decoding:
            _decoding_count -= 1
            if _decoding_count == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _tolerant_before
