"""Gradient of the preprocessing: the transposed resize, straight through rounding, towards the range outside of it."""

import numpy as np
import pytest
import torch
from smooth_pixels import smooth_pixels

from pyiqa_qscorer.images.preprocessing import STD
from pyiqa_qscorer.images.preprocessing import pixels_from_tensor as from_tensor


def slow_matrix(in_size: int, out_size: int) -> np.ndarray:
    """The bicubic filter (a = -0.5) written with loops and without fixed point."""
    scale, matrix = in_size / out_size, np.zeros((out_size, in_size))
    for row in range(out_size):
        center = (row + 0.5) * scale
        for column in range(in_size):
            x = abs(column + 0.5 - center) / max(scale, 1.0)
            if x < 1:
                matrix[row, column] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                matrix[row, column] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return matrix / matrix.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("height,width,size", [(9, 14, 8), (14, 9, 20), (12, 12, 12), (1, 5, 7)])
@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_is_the_transposed_resize(height: int, width: int, size: int, channels: int) -> None:
    """Also where a value is rounded or clipped by the filter; of values outside [0, 1] what descends towards it."""
    generator = torch.Generator().manual_seed(height)
    images = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(2, 3, size, size, generator=generator)
    from_tensor(images, size).backward(upstream)
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    matrix = torch.from_numpy(slow_matrix(side, size))
    down, across = matrix[:, top : top + height], matrix[:, left : left + width]
    expected = down.T @ (upstream.double() / torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)) @ across
    if channels == 1:
        expected = expected.sum(dim=1, keepdim=True)
    further_out = (images < 0) & (expected > 0) | (images > 1) & (expected < 0)
    torch.testing.assert_close(images.grad, expected.masked_fill(further_out, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_gradient_outside_the_range_only_leads_back(dtype: torch.dtype, sign: int) -> None:
    """What is minimised grows with the values (`sign` 1) or falls; the ends of the range belong to it."""
    images = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5]).view(1, 1, 1, 5).expand(1, 3, 5, 5)
    images = images.to(dtype).clone().requires_grad_()
    pixels = from_tensor(images, 8)
    (sign * pixels).sum().backward()
    assert images.grad is not None and images.grad.dtype == dtype and images.grad.isfinite().all()
    descends = (-images.grad).sign()[0, 0, 0].tolist()
    assert descends == ([0, -1, -1, -1, -1] if sign == 1 else [1, 1, 1, 1, 0])
    assert torch.equal(pixels.detach(), from_tensor(images.detach().clamp(0, 1), 8))


def test_gradient_of_a_network_that_overshoots_passes_through_vmap() -> None:
    """`torch.func`, for gradients per image."""
    images = 3 * torch.rand(4, 3, 6, 7, generator=torch.Generator().manual_seed(0)) - 1

    def total(image: torch.Tensor) -> torch.Tensor:
        return from_tensor(image[None], 8).square().sum()

    leaf = images.clone().requires_grad_()
    from_tensor(leaf, 8).square().sum().backward()
    torch.testing.assert_close(torch.stack([torch.func.grad(total)(image) for image in images]), leaf.grad)


@pytest.mark.parametrize("height,width,size", [(9, 14, 8), (14, 9, 20), (12, 12, 12)])
def test_smooth_path_is_the_exact_one_without_rounding(height: int, width: int, size: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = 0.4 + 0.2 * images  # so that the filter, which overshoots, does not reach what the exact path clips
    smooth, exact = (pixels(images, size) for pixels in (smooth_pixels, from_tensor))
    assert (smooth.dtype, exact.dtype) == (torch.float64, torch.float32)
    assert 0 < (smooth - exact).abs().max() < 2 / 255 / min(STD)
    upstream = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for pixels in (from_tensor, smooth_pixels):
        leaf = images.clone().requires_grad_()
        found = pixels(leaf, size)
        found.backward(upstream.to(found.dtype))
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    leaf = images[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda leaf: smooth_pixels(leaf, size), leaf)
