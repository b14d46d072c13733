"""From an image to the pixel values of the vision encoder, bit for bit as published.

The published preprocessing is: convert to RGB, pad to a square with the mean colour, resize to 448 x 448 with
Pillow's bicubic filter (8-bit result), scale to [0, 1], normalise. Files go through Pillow itself
(`pixels_from_pil`). Tensors go through `pixels_from_tensor`, whose own resize differs from Pillow's by 0 of 255
levels, on any device, and which is differentiable. The published centre crop is left out: after padding and
resizing the image already is a 448 x 448 square.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import threading
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from .errors import ImageError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOR = (int(255 * MEAN[0]), int(255 * MEAN[1]), int(255 * MEAN[2]))
RESCALE = 1 / 255
IMAGE_SIZE = 448

#: Longest side that is accepted. The work grows with the square of the longer side, and up to here the fixed-point
#: resize provably leaves the constant padding colour unchanged.
MAX_SIDE = 100_000
#: Values that are worked on at once; bounds the memory that large images need and never changes a result.
STRIP_VALUES = 2**21

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- reading images -----------------------------------------------------------------------------------------------


def open_image(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """Read an image completely and return it in mode RGB.

    `source` is a path, the bytes of an image file, or a PIL image (never changed, and returned itself if it
    already is RGB). As in the published code, the conversion is Pillow's `convert("RGB")`: alpha is dropped (not
    composited), gray is repeated, palette and CMYK are converted without colour profile. EXIF rotation is not
    applied: the image is taken as PIL opens it. Of an animation the first frame is taken; of a PIL image the frame
    that it is at. 16-bit *colour* files are opened by Pillow as their upper 8 bits.

    Raises `ImageError` for a missing, unreadable, empty, truncated, corrupt or non-image file, for more pixels than
    PIL's limit (`PIL.Image.MAX_IMAGE_PIXELS`; between one and two times the limit PIL warns), for an image of zero
    size, and for 16- and 32-bit gray modes (`I;16`, `I`, `F`): Pillow converts those by clipping at 255, which
    turns an ordinary 16-bit photo white, and no other conversion would agree with the published one.
    """
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        name = f"PIL image {filename!r}" if filename else "PIL image"
        with _reported_as_image_error(name), _truncated_files_fail():
            source.load()
            return _to_rgb(source, name)
    if isinstance(source, bytes):
        name = f"image given as {len(source)} bytes"
        if not source:
            raise ImageError(f"{name}: it is empty; pass the content of an image file.")
        return _decode(io.BytesIO(source), name)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        name = f"image {path!r}"
        _check_file(path, name)
        return _decode(path, name)
    raise ImageError(
        f"source must be a path, the bytes of an image file, or a PIL image, got {type(source).__name__}; "
        "tensors are scored by the metric itself or by Scorer."
    )


def _check_file(path: str, name: str) -> None:
    if "://" in path:
        raise ImageError(f"{name}: URLs are not fetched; download the file and pass its path.")
    try:
        if os.path.isdir(path):
            raise ImageError(f"{name}: it is a folder; pass the image files in it.")
        if not os.path.exists(path):
            raise ImageError(f"{name}: there is no such file; check the path (working folder {os.getcwd()!r}).")
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            raise ImageError(f"{name}: it is not a regular file; pass an image file or its bytes.")
        if os.path.getsize(path) == 0:
            raise ImageError(f"{name}: the file is empty (0 bytes); copy or download it again.")
    except OSError as error:
        raise ImageError(f"{name}: it cannot be read ({error.strerror or error}).") from error


def _decode(file: str | io.BytesIO, name: str) -> Image.Image:
    with _reported_as_image_error(name), _truncated_files_fail(), Image.open(file) as image:
        image.load()
        return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width == 0 or height == 0:
        raise ImageError(f"{name}: its size is {width}x{height}; both sides must be at least 1.")
    _check_side(width, height, name)
    if image.mode == "F" or image.mode.startswith("I"):
        raise ImageError(
            f"{name}: mode {image.mode!r} has more than 8 bits per value, and Pillow's conversion to RGB would clip "
            "every value above 255 to white. Convert it to 8 bits first, for 16-bit gray for example with "
            "PIL.Image.fromarray((numpy.asarray(image) / 257).round().astype('uint8'))."
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_side(width: int, height: int, name: str) -> None:
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name}: its size is {width}x{height}, the longer side must be at most {MAX_SIDE} pixels; "
            "crop or downscale it first."
        )


@contextlib.contextmanager
def _reported_as_image_error(name: str) -> Iterator[None]:
    """Turn whatever PIL raises into an `ImageError` that names the image."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: {error} If you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: it is not an image that Pillow can read (or its first bytes are damaged)."
        ) from error
    except Exception as error:  # PIL's decoders raise nearly every built-in exception on damaged files
        raise ImageError(
            f"{name}: it is truncated or corrupt ({type(error).__name__}: {error}); copy or download it again."
        ) from error


_decoding = threading.Lock()
_decoding_threads = 0
_tolerant_before = False


@contextlib.contextmanager
def _truncated_files_fail() -> Iterator[None]:
    """Keep PIL's process-wide LOAD_TRUNCATED_IMAGES off while any thread of ours decodes.

    Importing pyiqa's AVA dataset switches it on for the whole process; the missing part of a truncated file would
    then be filled with gray and scored without a word.
    """
    global _decoding_threads, _tolerant_before
    with _decoding:
        if _decoding_threads == 0:
            _tolerant_before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _decoding_threads += 1
    try:
        yield
    finally:
        with _decoding:
            _decoding_threads -= 1
            if _decoding_threads == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _tolerant_before


# --- pixel values -------------------------------------------------------------------------------------------------


def pixels_from_pil(image: Image.Image, size: int = IMAGE_SIZE) -> torch.Tensor:
    """Pixel values of one PIL image: float32 (3, size, size) on the CPU, normalised.

    Any mode that `open_image` accepts; raises its `ImageError`. Every image size works, 1x1 and 3x3 included, where
    the published code guesses the channel axis wrongly.
    """
    return _normalise(_resize_with_pillow(open_image(image), size))


def pixels_from_tensor(images: torch.Tensor, size: int = IMAGE_SIZE) -> torch.Tensor:
    """Pixel values of a batch: (B, 1 or 3, H, W) in [0, 1] -> float32 (B, 3, size, size), same device.

    Any of float16, bfloat16, float32, float64; gray is repeated. Values are first rounded to 8 bits, so k/255 in
    any of these dtypes gives what an image file with the value k gives, to the bit. Differentiable: every rounding
    and clipping is exact in the forward pass and the identity in the backward pass, so the gradient is that of pad,
    linear resize and normalisation, and pixels outside [0, 1] (clamped in the forward pass) still receive a
    gradient that can pull them back. Images do not influence each other.

    Raises `ImageError` as `check_images`. Does not look at the values, which would make the CPU wait for a GPU: an
    image with a NaN or infinite value gives NaN, one outside [0, 1] is clamped; callers that must reject them ask
    `values_in_range`.
    """
    check_images(images)
    images = images.expand(-1, 3, -1, -1)
    if _pillow_is_possible(images):
        levels = torch.stack([_resize_with_pillow(_to_pil(image), size) for image in images])
    else:
        levels = _resize_with_matrices(images, size)
    return _normalise(levels)


def check_images(images: torch.Tensor) -> None:
    """Raise `ImageError` unless `images` is a floating point (B, 1 or 3, H, W) tensor with at least one pixel.

    Values are not looked at: see `values_in_range`.
    """
    if not isinstance(images, torch.Tensor):
        raise ImageError(
            f"images must be a torch.Tensor (B, 3 or 1, H, W), got {type(images).__name__}; "
            "for paths and PIL images use Scorer or open_image."
        )
    shape = tuple(images.shape)
    if images.ndim != 4:
        hint = "add the batch axis with images.unsqueeze(0)" if images.ndim == 3 else "reshape it"
        raise ImageError(f"images must have 4 axes (B, 3 or 1, H, W), got shape {shape}; {hint}.")
    if images.dtype not in FLOAT_DTYPES:
        hint = "convert it with images.float()"
        if not images.is_floating_point() and not images.is_complex():
            hint += ", and divide by 255 if it holds 8-bit values"
        raise ImageError(
            f"images must be float16, bfloat16, float32 or float64 with values in [0, 1], got {images.dtype}; {hint}."
        )
    if 0 in shape:
        raise ImageError(f"images must hold at least one image of at least one pixel, got shape {shape}.")
    if shape[1] not in (1, 3):
        hint = "drop the alpha channel with images[:, :3]" if shape[1] == 4 else "the channel axis comes second"
        raise ImageError(f"images must have 1 (gray) or 3 (RGB) channels, got shape {shape}; {hint}.")
    _check_side(shape[3], shape[2], "images")


def values_in_range(images: torch.Tensor, tolerance: float = 1e-6) -> torch.Tensor:
    """Bool (B,), on the device of `images`: True where all values of an image are finite and in [0, 1].

    `tolerance` is allowed on either side, as in pyiqa. Does not wait for a GPU.
    """
    images = images.detach()
    low = images.amin(dim=(1, 2, 3)).double()
    high = images.amax(dim=(1, 2, 3)).double()
    return (low >= -tolerance) & (high <= 1 + tolerance)  # both are False for NaN


def _normalise(levels: torch.Tensor) -> torch.Tensor:
    """(..., 3, S, S) levels 0..255 -> float32: scaled in float64, then normalised in float32, as published."""
    mean, std, _ = _constants(levels.device)
    return ((levels.double() * RESCALE).float() - mean) / std


# --- pad to a square and resize, both as Pillow does -----------------------------------------------------------------


def _offsets(width: int, height: int) -> tuple[int, int, int]:
    """Side of the padded square, and the column and row where the image starts in it."""
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def _resize_with_pillow(image: Image.Image, size: int) -> torch.Tensor:
    """RGB image -> (3, size, size) uint8.

    Pillow resizes horizontally, then vertically. Doing the two passes apart allows to leave out the padding rows in
    the first, which keeps their constant colour, and to go through large images in strips of rows.
    """
    width, height = image.size
    side, left, top = _offsets(width, height)
    rows_per_strip = max(1, STRIP_VALUES // side)
    narrowed = Image.new("RGB", (size, side), PAD_COLOR)
    for row in range(0, height, rows_per_strip):
        strip = image
        if width < side or rows_per_strip < height:
            strip = Image.new("RGB", (side, min(rows_per_strip, height - row)), PAD_COLOR)
            strip.paste(image, (left, -row))
        narrowed.paste(strip.resize((size, strip.height), Image.Resampling.BICUBIC), (0, top + row))
    resized = narrowed.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _pillow_is_possible(images: torch.Tensor) -> bool:
    """On a CPU without gradient Pillow is several times faster than two matrix products, with the same bits."""
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if images.requires_grad and torch.is_grad_enabled():
        return False
    # A NaN or infinite value must not become a level: the matrices carry it on.
    return bool(images.sum(dtype=torch.float64).isfinite())


def _to_pil(image: torch.Tensor) -> Image.Image:
    _, height, width = image.shape
    rows_per_strip = max(1, STRIP_VALUES // (3 * width))
    levels = torch.empty(height, width, 3, dtype=torch.uint8)
    for row in range(0, height, rows_per_strip):
        rows = slice(row, row + rows_per_strip)
        levels[rows] = (image[:, rows].double() * 255).round_().clamp_(0, 255).permute(1, 2, 0)
    return Image.fromarray(levels.numpy())


def _resize_with_matrices(images: torch.Tensor, size: int) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size) float64 levels, equal to Pillow's on every value.

    The padded square is never built: what padding adds to an output value is a constant per channel. All sums are
    of multiples of 2^-22 below 2^53 x 2^-22 and therefore exact in float64, in any order.
    """
    height, width = images.shape[-2:]
    side, left, top = _offsets(width, height)
    matrix = _matrix_on(side, size, images.device)
    _, _, pad = _constants(images.device)
    across, across_pad = _of_image_and_padding(matrix, left, width)
    down, down_pad = _of_image_and_padding(matrix, top, height)

    rows_per_strip = max(1, STRIP_VALUES // (images.shape[0] * 3 * width))
    narrowed = torch.cat(
        [
            _round_and_clip(_quantise(strip) @ across.T + pad * across_pad)
            for strip in images.split(rows_per_strip, dim=-2)
        ],
        dim=-2,
    )
    # The padding rows keep their colour in the horizontal pass, so it enters the vertical one as it is.
    return _round_and_clip(down @ narrowed + pad * down_pad[:, None])


def _of_image_and_padding(matrix: torch.Tensor, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of the resize matrix that meet the image, and the sums (size,) of those that meet padding."""
    end = start + length
    return matrix[:, start:end], matrix[:, :start].sum(1) + matrix[:, end:].sum(1)


def _quantise(images: torch.Tensor) -> torch.Tensor:
    levels = images.double() * 255
    return straight_through(levels.round().clamp(0, 255), levels)


def _round_and_clip(levels: torch.Tensor) -> torch.Tensor:
    return straight_through((levels + 0.5).floor().clamp(0, 255), levels)


def straight_through(exact: torch.Tensor, smooth: torch.Tensor) -> torch.Tensor:
    """`exact`, to the bit, with the gradient of `smooth`; NaN where `smooth` is not finite."""
    return exact.detach() + (smooth - smooth.detach())


def _resize_matrix(in_size: int, out_size: int) -> np.ndarray:
    """Pillow's bicubic filter as a matrix (out_size, in_size): float64, every entry a multiple of 2^-22."""
    scale = in_size / out_size
    stretch = max(scale, 1.0)  # antialiasing: the kernel widens when the image shrinks
    centers = (np.arange(out_size) + 0.5) * scale
    first = np.maximum((centers - 2 * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + 2 * stretch + 0.5).astype(np.int64), in_size)
    taps = first[:, None] + np.arange((end - first).max())
    inside = taps < end[:, None]

    x = np.abs((taps - centers[:, None] + 0.5) * (1.0 / stretch))
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * inside
    weights /= weights.cumsum(axis=1)[:, -1:]  # summed one after the other, as Pillow does; .sum() adds in pairs
    fixed = np.trunc(weights * 2**22 + np.copysign(0.5, weights))

    matrix = np.zeros((out_size, in_size))
    rows, columns = inside.nonzero()
    matrix[rows, taps[rows, columns]] = fixed[rows, columns] / 2**22
    return matrix


@functools.lru_cache(maxsize=8)
def _cached_matrix(in_size: int, out_size: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a cached inference tensor could not be used for a gradient later
        return torch.from_numpy(_resize_matrix(in_size, out_size)).to(device)


@functools.lru_cache(maxsize=8)
def _cached_constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        mean = torch.tensor(MEAN, dtype=torch.float32, device=device).view(3, 1, 1)
        std = torch.tensor(STD, dtype=torch.float32, device=device).view(3, 1, 1)
        pad = torch.tensor(PAD_COLOR, dtype=torch.float64, device=device).view(3, 1, 1)
    return mean, std, pad


@torch.compiler.assume_constant_result
def _matrix_on(in_size: int, out_size: int, device: torch.device) -> torch.Tensor:
    return _cached_matrix(in_size, out_size, device)


@torch.compiler.assume_constant_result
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and std as float32 (3, 1, 1), padding colour as float64 (3, 1, 1)."""
    return _cached_constants(device)
