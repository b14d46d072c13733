"""The preprocessing without rounding and clipping: the smooth function that its gradient is that of."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyiqa_qscorer.images.mirror import mirrored_tensor
from pyiqa_qscorer.images.preprocessing import MEAN, PAD_COLOR, STD, Fit
from pyiqa_qscorer.images.resize_matrix import resize_matrix


def smooth_pixels(images: Tensor, size: int, fit: Fit = "pad") -> Tensor:
    """(B, 3, H, W) in [0, 1] -> float64 (B, 3, size, size), as `pixels_from_tensor`."""
    images = mirrored_tensor(images, size) if fit == "mirror" else images
    height, width = images.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    color, mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (PAD_COLOR, MEAN, STD))
    levels = pad(images.double() * 255 - color, (left, side - width - left, top, side - height - top)) + color
    matrix = torch.from_numpy(resize_matrix(side, size))
    return (matrix @ levels @ matrix.T / 255 - mean) / std
