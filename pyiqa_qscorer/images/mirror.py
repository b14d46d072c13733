"""Pictures continued by reflection to a square, for networks that are to see small pictures at their own resolution.

The published preprocessing pads a picture to a square with the mean colour and enlarges a small one, after which nobody
can tell a sharp crop from a blurred photo. Reflection keeps every pixel and adds none of another kind: what is missing
on either side is the picture itself, turned round again and again.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def mirror_order(length: int, side: int) -> np.ndarray:
    """(side,) indices into `length` pixels: the pixels in the middle, reflected outwards, edge pixels twice.

    >>> mirror_order(3, 8).tolist()
    [1, 0, 0, 1, 2, 2, 1, 0]
    """
    place = (np.arange(side) - (side - length) // 2) % (2 * length)
    return np.minimum(place, 2 * length - 1 - place)


def mirrored_picture(image: Image.Image, size: int) -> Image.Image:
    """RGB picture -> RGB square of its longer side, at least `size`; one that is large enough is returned as is."""
    width, height = image.size
    side = max(width, height, size)
    if width == height == side:
        return image
    levels = np.asarray(image)[mirror_order(height, side)][:, mirror_order(width, side)]
    return Image.fromarray(levels)


def mirrored_tensor(images: torch.Tensor, size: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, side, side), the same pixels as `mirrored_picture`; differentiable."""
    height, width = images.shape[-2:]
    side = max(width, height, size)
    if width == height == side:
        return images
    rows, columns = (torch.from_numpy(mirror_order(length, side)).to(images.device) for length in (height, width))
    return images.index_select(-2, rows).index_select(-1, columns)
