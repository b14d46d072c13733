"""Squares made by reflection: every pixel of the picture kept, files and tensors alike, gradients that reach it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from smooth_pixels import smooth_pixels

from pyiqa_qscorer.images.mirror import mirror_order, mirrored_picture, mirrored_tensor
from pyiqa_qscorer.images.preprocessing import levels_from_pil, levels_from_tensor, pixels_from_tensor

SIZE = 56
SHAPES = [(1, 1), (3, 50), (20, 20), (56, 56), (57, 40), (200, 90)]


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].double() / 255


@given(length=st.integers(1, 90), more=st.integers(0, 300))
def test_every_pixel_is_kept_and_neighbours_stay_neighbours(length: int, more: int) -> None:
    order = mirror_order(length, length + more)
    assert set(order) == set(range(length)) and np.abs(np.diff(order)).max(initial=0) <= 1
    start = more // 2
    assert order[start : start + length].tolist() == list(range(length))


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pictures_and_tensors_have_the_same_levels(height: int, width: int) -> None:
    picture = noise(height, width)
    tensor, levels = as_tensor(picture), levels_from_pil(picture, SIZE, "mirror")
    assert torch.equal(levels_from_tensor(tensor, SIZE, "mirror")[0], levels)
    with_gradient = pixels_from_tensor(tensor.clone().requires_grad_(), SIZE, fit="mirror")
    assert torch.equal(with_gradient.detach(), pixels_from_tensor(tensor, SIZE, fit="mirror"))


def test_small_pictures_are_not_enlarged_and_large_squares_left_alone() -> None:
    picture, middle = noise(20, 20), (SIZE - 20) // 2
    levels = levels_from_pil(picture, SIZE, "mirror")[:, middle : middle + 20, middle : middle + 20]
    assert torch.equal(levels, torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1))
    picture, tensor = noise(80, 80), torch.rand(1, 3, 80, 80)
    assert mirrored_picture(picture, SIZE) is picture and mirrored_tensor(tensor, SIZE) is tensor
    assert torch.equal(levels_from_pil(picture, SIZE, "mirror"), levels_from_pil(picture, SIZE))


def test_gradient_is_that_of_differences_and_images_do_not_mix() -> None:
    images = torch.rand(1, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: smooth_pixels(x, 8, "mirror"), images)
    images = torch.rand(3, 3, 20, 30)
    together = pixels_from_tensor(images, SIZE, fit="mirror")
    assert torch.equal(together, torch.cat([pixels_from_tensor(image[None], SIZE, fit="mirror") for image in images]))
