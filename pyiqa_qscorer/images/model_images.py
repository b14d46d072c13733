"""How pictures become what a network takes: squares of one size, or whole pictures for a processor of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import preprocessing
from .reading import open_image


class ModelImages(Protocol):
    """What scoring, the loss and training ask of the pictures' side of a network.

    `levels` are 8-bit pictures, uint8 (3, H, W); `inputs` is what the network's `score_prompted` takes of a batch.
    Files, PIL pictures and tensors with the same 8-bit values give the same levels.
    """

    @property
    def smallest_side(self) -> int:
        """Of pictures that the network can judge, in pixels."""

    def levels_from_pil(self, picture: Image.Image) -> Tensor: ...

    def levels_from_tensor(self, image: Tensor) -> Tensor:
        """(1, 3 or 1, H, W) floating point in [0, 1] -> levels, without gradient."""

    def sample(self, picture: Image.Image) -> Tensor:
        """A picture as a training sample holds it."""

    def inputs(self, levels: Sequence[Tensor]) -> Any:
        """Inputs of a batch of levels, on their device."""

    def inputs_from_batch(self, images: Tensor) -> Any:
        """Inputs of (B, 3 or 1, H, W) floating point images in [0, 1]; differentiable."""


@dataclass(frozen=True)
class SquareImages:
    """Normalised pixel values (B, 3, size, size), see `preprocessing`."""

    size: int = preprocessing.IMAGE_SIZE
    fit: preprocessing.Fit = "pad"
    smallest_side: int = 1

    def levels_from_pil(self, picture: Image.Image) -> Tensor:
        return preprocessing.levels_from_pil(picture, self.size, self.fit)

    def levels_from_tensor(self, image: Tensor) -> Tensor:
        return preprocessing.levels_from_tensor(image, self.size, self.fit)[0]

    def sample(self, picture: Image.Image) -> Tensor:
        return preprocessing.pixels_from_pil(picture, self.size, self.fit)

    def inputs(self, levels: Sequence[Tensor]) -> Tensor:
        return preprocessing.normalise(torch.stack(list(levels)))

    def inputs_from_batch(self, images: Tensor) -> Tensor:
        return preprocessing.pixels_from_tensor(images, self.size, fit=self.fit)


@dataclass(frozen=True)
class WholePictures:
    """Pictures of any size, which the network's own processor resizes: a list of levels, or of floating point ones."""

    smallest_side: int = 1

    def levels_from_pil(self, picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(open_image(picture))).permute(2, 0, 1).contiguous()

    def levels_from_tensor(self, image: Tensor) -> Tensor:
        return rounded_levels(image.detach()[0].double() * 255)

    def sample(self, picture: Image.Image) -> Tensor:
        return self.levels_from_pil(picture)

    def inputs(self, levels: Sequence[Tensor]) -> list[Tensor]:
        return list(levels)

    def inputs_from_batch(self, images: Tensor) -> list[Tensor]:
        if not (images.requires_grad and torch.is_grad_enabled()):
            return [self.levels_from_tensor(image[None]) for image in images]
        return list(preprocessing.OnlyInwards.apply(images).expand(-1, 3, -1, -1).double() * 255)


def rounded_levels(levels: Tensor) -> Tensor:
    """(1 or 3, H, W) values around 0..255 -> uint8 (3, H, W)."""
    if levels.dtype == torch.uint8:
        return levels
    return levels.detach().round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
