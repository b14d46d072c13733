"""From an image to the pixel values of the vision encoder, bit for bit as published.

The published preprocessing: convert to RGB, pad to a square with the mean colour, resize to 448 x 448 with Pillow's
bicubic filter (8-bit result), scale to [0, 1], normalise. Images from files go through Pillow itself, tensors through
`pixels_from_tensor`, whose own resize is differentiable, runs on any device, and differs from Pillow's in 0 of all
values. The published centre crop is left out: a padded and resized image already is a square of that size.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image

from ..errors import ImageError
from .mirror import mirrored_picture, mirrored_tensor
from .reading import check_sides, open_image
from .resize_matrix import cached_unless_tracing, resize_matrix, resize_matrix_on

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOR = (int(255 * MEAN[0]), int(255 * MEAN[1]), int(255 * MEAN[2]))
IMAGE_SIZE = 448

STRIP_VALUES = 2**20  # worked on at once; bounds the memory that large images need, never changes a result
MOST_PADDING = 8  # a square that is wider than the image by more than this is not built: the work would grow with it
Matrix = TypeVar("Matrix", torch.Tensor, np.ndarray[Any, np.dtype[np.float64]])
#: How a picture becomes a square: `pad`, as published, or `mirror` (see `mirror.py`), which never enlarges.
Fit = Literal["pad", "mirror"]

TOLERANCE = 1e-6  # on either side of [0, 1]; pyiqa's
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pixels_from_pil(image: Image.Image, size: int = IMAGE_SIZE, fit: Fit = "pad") -> torch.Tensor:
    """Normalised pixel values of one PIL image: float32 (3, size, size), on the CPU.

    Takes every mode and size that `open_image` takes and raises its `ImageError`; 1x1 and 3x3 included, for which the
    published code mistakes rows for channels.
    """
    return normalise(levels_from_pil(image, size, fit))


def levels_from_pil(image: Image.Image, size: int = IMAGE_SIZE, fit: Fit = "pad") -> torch.Tensor:
    """The same before normalisation: levels 0..255, uint8 (3, size, size)."""
    picture = open_image(image)
    return _resize_with_pillow(mirrored_picture(picture, size) if fit == "mirror" else picture, size)


def pixels_from_tensor(images: torch.Tensor, size: int = IMAGE_SIZE, fit: Fit = "pad") -> torch.Tensor:
    """Normalised pixel values of a batch (B, 1 or 3, H, W) in [0, 1]: float32 (B, 3, size, size).

    float16, bfloat16, float32 or float64, any device; gray is repeated. Values are first rounded to 8 bits, so k/255 in
    any of these dtypes gives, to the bit, what a file with the value k gives. Images do not influence each other.

    Differentiable: each rounding and each clipping is exact in the forward pass and the identity in the backward pass.
    The gradient is that of a linear resize. Values outside [0, 1], which the forward pass clamps, get the part of it
    whose descent step moves them back towards [0, 1]; a step that would move them further out gets none. So what is
    minimised must be what `backward` is called on, as with every optimiser of PyTorch.

    Raises `ImageError` as `check_images` does. Values are not judged, since that would make the CPU wait for the GPU:
    an image with a NaN or infinite value gives NaN. Callers that must refuse such images ask `values_in_range` or
    `values_near_range`.
    """
    check_images(images)
    if images.device.type == "mps":  # Apple GPUs have no float64
        return pixels_from_tensor(images.cpu(), size, fit).to(images.device)
    if images.requires_grad and torch.is_grad_enabled():
        images = OnlyInwards.apply(images)
    images = images.expand(-1, 3, -1, -1)
    if fit == "mirror":
        images = mirrored_tensor(images, size)
    if _pillow_gives_the_same(images):
        return normalise(torch.stack([_resize_with_pillow(_to_pil(image), size) for image in images]))
    return normalise(_resize_with_matrices(images, size))


def levels_from_tensor(images: torch.Tensor, size: int = IMAGE_SIZE, fit: Fit = "pad") -> torch.Tensor:
    """As `pixels_from_tensor` before normalisation: uint8 (B, 3, size, size), without gradient, of finite values."""
    check_images(images)
    images = images.detach().expand(-1, 3, -1, -1)
    if fit == "mirror":
        images = mirrored_tensor(images, size)
    if images.device.type in ("cpu", "mps"):
        return torch.stack([_resize_with_pillow(_to_pil(image), size) for image in images.cpu()])
    return _resize_with_matrices(images, size).to(torch.uint8)


def check_images(images: torch.Tensor) -> None:
    """Raise `ImageError` unless `images` is a floating point (B, 1 or 3, H, W) tensor, not empty."""
    if not isinstance(images, torch.Tensor):
        raise ImageError(
            f"images must be a torch.Tensor (B, 3 or 1, H, W), got {type(images).__name__}; "
            "give paths and PIL images to Scorer."
        )
    shape = tuple(images.shape)
    if images.ndim != 4:
        hint = "add the batch axis with images[None]" if images.ndim == 3 else "reshape it"
        raise ImageError(f"images must have 4 axes (B, 3 or 1, H, W), got shape {shape}; {hint}.")
    if images.dtype not in FLOAT_DTYPES:
        raise ImageError(
            "images must be float16, bfloat16, float32 or float64 with values in [0, 1], "
            f"got {images.dtype}; convert with images.float(), and divide by 255 if it is 8-bit."
        )
    if shape[1] not in (1, 3):
        hint = "drop alpha with images[:, :3]" if shape[1] == 4 else "channels are the second axis"
        raise ImageError(f"images must have 1 or 3 channels, got shape {shape}; {hint}.")
    if shape[0] == 0:
        raise ImageError(f"images must hold at least one image, got shape {shape}.")
    check_sides(shape[3], shape[2], "images")


def values_in_range(images: torch.Tensor) -> torch.Tensor:
    """Bool (B,) on the device of `images` (B, C, H, W), not waited for: all values finite and in [0, 1]?"""
    images = images.detach()
    low, high = images.amin(dim=(1, 2, 3)).float(), images.amax(dim=(1, 2, 3)).float()
    return (low >= -TOLERANCE) & (high <= 1 + TOLERANCE)  # NaN is neither


def values_near_range(images: torch.Tensor) -> torch.Tensor:
    """Bool (B,), as `values_in_range`: all values finite and, on average, no further outside [0, 1] than its width?

    Holds for the overshoot of an optimiser and the output of an untrained network, not for 8-bit values.
    """
    images = images.detach()
    return (images - images.clamp(0, 1)).abs().float().mean(dim=(1, 2, 3)) <= 1  # NaN is not


def normalise(levels: torch.Tensor) -> torch.Tensor:
    """Levels 0..255 (..., 3, S, S) -> float32 pixel values; scaled in float64, normalised in float32."""
    mean, std, _ = _constants(levels.device)
    return ((levels.double() * (1 / 255)).float() - mean) / std


class OnlyInwards(torch.autograd.Function):
    """The identity; of the gradient of values outside [0, 1] only what descends towards it.

    The projection of a descent direction on those that an image may take, so an overshooting optimiser neither drifts
    away nor gets stuck. Inside, ends included, all of the gradient passes.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(images: torch.Tensor) -> torch.Tensor:
        return images.view_as(images)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (images,) = ctx.saved_tensors
        outwards = ((images < 0) & (gradient > 0)) | ((images > 1) & (gradient < 0))
        return gradient.masked_fill(outwards, 0)


def _square(width: int, height: int) -> tuple[int, int, int]:
    """Side of the padded square, and the column and row at which the image starts in it."""
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def _resize_with_pillow(image: Image.Image, size: int) -> torch.Tensor:
    """RGB image -> uint8 (3, size, size).

    Pillow resizes rows, then columns. Called for one direction at a time, the first pass can skip the padding rows,
    whose colour it would not change, and go through large images in strips. Output columns that no pixel of a narrow
    image reaches keep the colour of the padding as well; neither pass visits them.
    """
    width, height = image.size
    side, left, top = _square(width, height)
    resize_rows, first, columns = _resize_padded_rows, 0, size
    if side > MOST_PADDING * width:
        matrix = resize_matrix(side, size)
        reached = np.flatnonzero(np.abs(matrix[:, left : left + width]).sum(axis=1))
        first, columns = int(reached[0]), int(reached[-1] - reached[0]) + 1  # a weight in between may be zero
        matrix = matrix[first : first + columns]
        resize_rows = functools.partial(_resize_narrow_rows, matrix=matrix)
    step = max(1, STRIP_VALUES // (side if columns == size else 3 * width))
    narrowed = Image.new("RGB", (columns, side), PAD_COLOR)
    for row in range(0, height, step):
        strip = image.crop((0, row, width, min(row + step, height))) if step < height else image
        narrowed.paste(resize_rows(strip, side, left, size), (0, top + row))
    resized = Image.new("RGB", (size, size), PAD_COLOR)
    resized.paste(narrowed.resize((columns, size), Image.Resampling.BICUBIC), (first, 0))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _resize_padded_rows(rows: Image.Image, side: int, left: int, size: int) -> Image.Image:
    """Rows padded to the width `side`, resized to the width `size` by Pillow."""
    if rows.width < side:
        padded = Image.new("RGB", (side, rows.height), PAD_COLOR)
        padded.paste(rows, (left, 0))
        rows = padded
    return rows.resize((size, rows.height), Image.Resampling.BICUBIC)


def _resize_narrow_rows(
    rows: Image.Image, side: int, left: int, size: int, *, matrix: np.ndarray[Any, np.dtype[np.float64]]
) -> Image.Image:
    """The same without building the padding; of the output only the columns that `matrix` (columns, side) gives."""
    across, across_padding = _of_image_and_padding(matrix, left, left + rows.width)
    levels = np.asarray(rows).transpose(0, 2, 1) @ across.T + np.outer(PAD_COLOR, across_padding)
    return Image.fromarray(np.floor(levels + 0.5).clip(0, 255).astype(np.uint8).transpose(0, 2, 1))


def _pillow_gives_the_same(images: torch.Tensor) -> bool:
    """On the CPU without gradient Pillow is 2 to 3 times faster than the matrices, same bits."""
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if images.requires_grad and torch.is_grad_enabled():
        return False
    # 8 bits cannot carry a NaN on, the matrices can.
    return all(bool(extreme.isfinite()) for extreme in images.aminmax())


def _to_pil(image: torch.Tensor) -> Image.Image:
    _, height, width = image.shape
    step = max(1, STRIP_VALUES // (3 * width))
    levels = torch.empty(height, width, 3, dtype=torch.uint8, device="cpu")
    for row in range(0, height, step):
        strip = image[:, row : row + step].detach().double() * 255
        levels[row : row + step] = strip.round_().clamp_(0, 255).permute(1, 2, 0)
    return Image.fromarray(levels.numpy())


def _resize_with_matrices(images: torch.Tensor, size: int) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] -> float64 levels (B, 3, size, size), each equal to Pillow's.

    Padding is never built: what it adds to an output value is a constant. Exact, because each sum is one of multiples
    of 2^-22 that float64 holds exactly, whatever the order of summation.
    """
    # A compiled graph is for one image size: index() makes torch.compile see plain numbers.
    height, width = (operator.index(length) for length in images.shape[-2:])
    side, left, top = _square(width, height)
    step = max(1, STRIP_VALUES // (images.shape[0] * 3 * width))
    matrix = resize_matrix_on(side, size, images.device)
    _, _, pad = _constants(images.device)
    across, across_padding = _of_image_and_padding(matrix, left, left + width)
    down, down_padding = _of_image_and_padding(matrix, top, top + height)

    strips = [_to_levels(strip) @ across.T + pad * across_padding for strip in images.split(step, dim=-2)]
    narrowed = torch.cat([_round_and_clip(strip) for strip in strips], dim=-2)
    # The padding rows keep their colour in the first pass, so it enters the second as it is.
    return _round_and_clip(down @ narrowed + pad * down_padding[:, None])


def _of_image_and_padding(matrix: Matrix, start: int, end: int) -> tuple[Matrix, Matrix]:
    """Columns of the resize matrix that meet the image; sum (size,) of those that meet padding."""
    return matrix[:, start:end], matrix[:, :start].sum(1) + matrix[:, end:].sum(1)


def _to_levels(images: torch.Tensor) -> torch.Tensor:
    levels = images.double() * 255
    return straight_through(levels.detach().round().clamp(0, 255), levels)


def _round_and_clip(levels: torch.Tensor) -> torch.Tensor:
    return straight_through((levels.detach() + 0.5).floor().clamp(0, 255), levels)


def straight_through(exact: torch.Tensor, smooth: torch.Tensor) -> torch.Tensor:
    """`exact`, to the bit, with the gradient of `smooth`; NaN where `smooth` is not finite."""
    return exact.detach() + (smooth - smooth.detach())


@torch.compiler.assume_constant_result
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and std as float32 (3, 1, 1), padding colour as float64 (3, 1, 1)."""
    return cached_unless_tracing(_build_constants)(device)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _build_constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean = torch.tensor(MEAN, dtype=torch.float32, device=device).view(3, 1, 1)
    std = torch.tensor(STD, dtype=torch.float32, device=device).view(3, 1, 1)
    pad = torch.tensor(PAD_COLOR, dtype=torch.float64, device=device).view(3, 1, 1)
    return mean, std, pad
