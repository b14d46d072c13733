"""What `Scorer` takes as an image, made ready for the model: paths, bytes, PIL images, tensors and arrays."""

from __future__ import annotations

import os
import threading
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from ..errors import ImageError, QScorerError
from . import preprocessing
from . import reading as image_files
from .model_images import ModelImages
from .staging import PreparedImage

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | torch.Tensor | np.ndarray"


class ImagePreparation:
    """Reads images and makes what the model takes of them; to be called from many threads."""

    def __init__(self, images: ModelImages) -> None:
        self.images = images
        # One PIL image may stand in the input twice; it cannot be loaded by two threads at once.
        self._pil_lock = threading.Lock()

    def __call__(self, image: ImageLike) -> PreparedImage:
        """Levels of one image, or why it has none."""
        source = describe(image)
        try:
            with torch.no_grad():
                if isinstance(image, torch.Tensor):
                    return self._from_tensor(source, image)
                picture = self.picture(image)
                levels = self.images.levels_from_pil(picture)
                return PreparedImage(source, levels, width=picture.width, height=picture.height)
        except ImageError as error:
            return PreparedImage(source, error=reason(error, source))
        except MemoryError:
            return PreparedImage(source, error="not enough memory to decode this image")

    def _from_tensor(self, source: str, image: torch.Tensor) -> PreparedImage:
        if image.layout != torch.strided or image.is_nested or image.is_meta:
            kind = "on device meta, which has none" if image.is_meta else f"{image.layout}: give image.to_dense()"
            raise ImageError(f"a tensor must be dense and hold values, this one is {kind}")
        if image.ndim != 3:
            raise ImageError(f"a tensor must have shape (3 or 1, H, W), not {tuple(image.shape)}")
        batch = image.detach().unsqueeze(0)
        preprocessing.check_images(batch)
        if not preprocessing.values_in_range(batch).item():
            low, high = batch.amin().item(), batch.amax().item()
            raise ImageError(
                f"values must be finite and in [0, 1], but go from {low:g} to {high:g}; "
                "divide by 255 if they are 8-bit values"
            )
        levels = self.images.levels_from_tensor(batch)
        return PreparedImage(source, levels, width=image.shape[2], height=image.shape[1])

    def picture(self, image: object) -> Image.Image:
        """RGB picture of whatever is an image but no tensor. Raises `ImageError`."""
        if isinstance(image, np.ndarray):
            image = image_from_array(image)
        if isinstance(image, Image.Image):
            with self._pil_lock:
                return image_files.open_image(image)
        if isinstance(image, (str, os.PathLike, bytes)):
            return image_files.open_image(image)
        raise ImageError(
            f"an image cannot be a {type(image).__name__}: give a path, bytes, a PIL image, "
            "a tensor (3, H, W) in [0, 1] or a uint8 array (H, W, 3)"
        )


def image_from_array(array: np.ndarray) -> Image.Image:
    """PIL image of a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) in RGB(A) order."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    right_shape = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not right_shape or 0 in array.shape:
        raise ImageError(
            f"an array must be uint8 (H, W), (H, W, 3) or (H, W, 4), not {array.dtype} "
            f"{array.shape}; give values in [0, 1] as a torch tensor (3, H, W)"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def describe(image: object) -> str:
    """A path as given; of an image in memory its kind and size."""
    if isinstance(image, (str, os.PathLike)):
        return os.fsdecode(image)
    if isinstance(image, bytes):
        return f"<{len(image)} bytes>"
    if isinstance(image, Image.Image):
        return f"<PIL image {image.width}x{image.height}>"
    if isinstance(image, (torch.Tensor, np.ndarray)):
        kind = "tensor" if isinstance(image, torch.Tensor) else "array"
        nested = isinstance(image, torch.Tensor) and image.is_nested  # which has no shape
        return f"<nested {kind}>" if nested else f"<{kind} {tuple(image.shape)}>"
    return f"<{type(image).__name__}>"


def reason(error: QScorerError, source: str) -> str:
    """The message in one line, without the name of the image, which every report has anyway."""
    return " ".join(str(error).removeprefix(f"image {source!r}: ").split())


def is_single(images: object) -> bool:
    """Whether this is one image, not an iterable of images; a tensor or array unless it has 4 axes."""
    if isinstance(images, torch.Tensor):
        return images.ndim != 4 or images.is_mkldnn  # which cannot be taken apart
    if isinstance(images, np.ndarray):
        return images.ndim != 4
    return isinstance(images, (str, os.PathLike, bytes, Image.Image))
