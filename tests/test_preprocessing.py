"""Preprocessing against the published results and against Pillow itself, its gradient, and checks of tensors."""

import functools
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import matrix_levels, plain_levels, plain_pixels, random_image, to_tensor
from PIL import Image
from safetensors.torch import load_file

from pyiqa_qscorer.errors import ImageError
from pyiqa_qscorer.images import preprocessing, resize_matrix
from pyiqa_qscorer.images.preprocessing import (
    MEAN,
    PAD_COLOR,
    STD,
    check_images,
    pixels_from_pil,
    pixels_from_tensor,
    values_in_range,
)
from pyiqa_qscorer.images.reading import open_image

GOLDEN_IMAGES = [
    "a_rgb_512x384",
    "b_rgb_384x512",
    "c_rgb_448x448",
    "d_rgb_33x700",
    "e_gray_300x201",
    "f_rgba_256x400",
    "g_rgb_451x333",
    "h_rgb_1024x768",
    "i_rgb_7x5",
    "j_la_97x64",
    "k_p_120x90",
    "q_rgb_1x1",
    "q_rgb_3x2",
    "q_rgb_3x3",
]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@functools.lru_cache(maxsize=1)
def reference() -> dict[str, dict]:
    path = Path(__file__).parent / "golden" / "preprocessing" / "preprocessing.json"
    return json.loads(path.read_text())["images"]


def assert_as_published(pixels: torch.Tensor, name: str, golden: Path) -> None:
    assert pixels.shape == (3, 448, 448)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    expected = reference()[name]
    tensors = load_file(golden / "preprocessing" / "pixel_values.safetensors")
    if name == "q_rgb_1x1":  # the published code fails on it
        with Image.open(golden / "images" / "q_rgb_1x1.png") as image:
            value = torch.tensor(image.getpixel((0, 0)), dtype=torch.float64) / 255
        colour = (value.float() - torch.tensor(MEAN)) / torch.tensor(STD)
        assert torch.equal(pixels, colour.view(3, 1, 1).expand(3, 448, 448))
        return
    if name.startswith("q_"):  # the published code is right where it does not guess the axes
        sha256 = expected["sha256_fp32_when_in_batch_after_a_normal_image"]
        values = tensors[f"batch_sub.{name}"]
    else:
        sha256, values = expected["sha256_fp32"], tensors[f"sub.{name}"]
        half = pixels.half().numpy().tobytes()
        assert hashlib.sha256(half).hexdigest() == expected["sha256_fp16"]
    assert torch.equal(pixels.flatten()[tensors["positions"]], values)
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == sha256


def test_constants() -> None:
    assert PAD_COLOR == (122, 116, 104)
    assert MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert STD == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("name", GOLDEN_IMAGES)
def test_files_as_published(name: str, golden: Path) -> None:
    path = golden / reference()[name]["file"]
    with Image.open(path) as lazy:
        for source in (path, str(path), path.read_bytes(), lazy):
            assert_as_published(pixels_from_pil(open_image(source)), name, golden)
    with Image.open(path) as unconverted:
        assert_as_published(pixels_from_pil(unconverted), name, golden)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", GOLDEN_IMAGES)
def test_tensors_as_published(name: str, dtype: torch.dtype, golden: Path) -> None:
    images = to_tensor(open_image(golden / reference()[name]["file"]), dtype)
    assert_as_published(pixels_from_tensor(images)[0], name, golden)
    assert_as_published(pixels_from_tensor(images.requires_grad_())[0].detach(), name, golden)


@pytest.mark.parametrize("height,width", [(40, 61), (448, 448), (500, 300), (700, 900), (5, 9)])
def test_equals_the_clip_processor(height: int, width: int) -> None:
    """transformers' processor with Pillow is the published one; pad by hand before."""
    from transformers import CLIPImageProcessorPil

    image = random_image(height, width, seed=height)
    side = max(height, width)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 448}, crop_size={"height": 448, "width": 448}, image_mean=list(MEAN), image_std=list(STD)
    )
    expected = processor(square, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels_from_pil(image), expected)
    assert torch.equal(pixels_from_tensor(to_tensor(image))[0], expected)


def assert_equals_pillow(image: Image.Image, size: int) -> None:
    expected = plain_levels(image, size)
    images = to_tensor(image)
    np.testing.assert_array_equal(matrix_levels(images, size), expected)
    pixels = plain_pixels(image, size)
    assert torch.equal(pixels_from_pil(image, size), pixels)
    assert torch.equal(pixels_from_tensor(images, size)[0], pixels)
    differentiable = pixels_from_tensor(images.requires_grad_(), size)[0]
    assert torch.equal(differentiable.detach(), pixels)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(1, 100),
    seed=st.integers(0, 2**32 - 1),
    harsh=st.booleans(),
)
def test_any_size_equals_pillow(height: int, width: int, size: int, seed: int, harsh: bool) -> None:
    assert_equals_pillow(random_image(height, width, seed, harsh=harsh), size)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    long=st.integers(20, 700),
    short=st.integers(1, 12),
    size=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
    harsh=st.booleans(),
    tall=st.booleans(),
)
def test_narrow_images_equal_pillow(long: int, short: int, size: int, seed: int, harsh: bool, tall: bool) -> None:
    shape = (long, short) if tall else (short, long)
    image = random_image(*shape, seed, harsh=harsh)
    np.testing.assert_array_equal(
        preprocessing.levels_from_pil(image, size).permute(1, 2, 0), plain_levels(image, size)
    )


@pytest.mark.parametrize(
    "height,width", [(1, 1), (2, 2), (3, 3), (1, 700), (700, 1), (33, 700), (64, 1), (64, 7), (5000, 3)]
)
@pytest.mark.parametrize("harsh", [False, True])
def test_tiny_and_thin_images_equal_pillow(height: int, width: int, harsh: bool) -> None:
    assert_equals_pillow(random_image(height, width, seed=width, harsh=harsh), 448)


@pytest.mark.parametrize(
    "height,width,harsh",
    [
        (447, 448, True),
        (448, 447, False),
        (449, 449, True),
        (224, 224, False),
        (600, 1201, True),
        (1201, 700, False),
        (31, 2500, True),
    ],
)
def test_448_equals_pillow(height: int, width: int, harsh: bool) -> None:
    assert_equals_pillow(random_image(height, width, seed=width, harsh=harsh), 448)


@pytest.mark.parametrize("height,width", [(40, 61), (61, 40), (50, 50), (64, 20), (1, 64)])
def test_strips_change_nothing(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for strip_values in (1, 300, 1000, 2**20):
        monkeypatch.setattr(preprocessing, "STRIP_VALUES", strip_values)
        assert_equals_pillow(random_image(height, width, seed=4), 30)


@pytest.mark.parametrize("shape", [(2, 40_000), (65_535, 1)])
def test_long_thin_images_are_cheap(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their padded square would have more than 1.6 thousand million pixels: nothing near it is built or gone through.

    A picture of one column, a PNG of some hundred bytes, took 22 seconds.
    """
    gone_through = 0
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *options: object) -> Image.Image:
        nonlocal gone_through
        gone_through += self.width * self.height
        return resize(self, size, *options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    image = random_image(*shape, seed=0)
    pixels = pixels_from_pil(image)
    assert gone_through <= 40_000 * 450
    if shape[0] < shape[1]:
        assert torch.equal(pixels_from_tensor(to_tensor(image).requires_grad_())[0].detach(), pixels)


@pytest.mark.parametrize("in_size", [1, 3, 447, 448, 449, 1000, 4000, 65_535])
def test_padding_keeps_its_colour(in_size: int) -> None:
    """Both resizes lean on it: rows of nothing but padding are not resized in the first pass."""
    row_sums = resize_matrix.resize_matrix(in_size, 448).sum(axis=1)
    for level in (*PAD_COLOR, 255):
        np.testing.assert_array_equal(np.floor(level * row_sums + 0.5), level)


@pytest.mark.parametrize("height,width", [(6, 9), (6, 10), (9, 6), (10, 6), (7, 8), (8, 7)])
def test_padding_offsets(height: int, width: int) -> None:
    """At the size of the square no value is resampled, so the paste itself is visible."""
    image = random_image(height, width, seed=1)
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    expected = np.full((side, side, 3), PAD_COLOR, np.uint8)
    expected[top : top + height, left : left + width] = np.array(image)
    np.testing.assert_array_equal(matrix_levels(to_tensor(image), side), expected)
    pillow = preprocessing._resize_with_pillow(image, side).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pillow, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_8_bit_value_survives_every_dtype(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.float64)
    for values in ((levels / 255).to(dtype), levels.to(dtype) / 255):
        assert torch.equal(preprocessing._to_levels(values), levels)
        rows = values.view(1, 1, 16, 16).expand(1, 3, 16, 16)
        image = preprocessing._to_pil(rows[0])
        assert torch.equal(torch.from_numpy(np.array(image))[..., 0].flatten().double(), levels)


@pytest.mark.parametrize("size", [4, 6, 11])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_values_are_rounded_and_clamped_before_the_resize(requires_grad: bool, size: int) -> None:
    steps = torch.tensor([10.4, 10.6, 0.4, 254.6, -300.0, 700.0, 1e20], dtype=torch.float64)
    levels = torch.tensor([10.0, 11.0, 0.0, 255.0, 0.0, 255.0, 255.0], dtype=torch.float64)
    given, rounded = (
        pixels_from_tensor((x / 255).view(1, 1, 1, -1).requires_grad_(requires_grad), size).detach()
        for x in (steps, levels)
    )
    assert torch.equal(given, rounded)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_does_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    """A value halfway between two levels goes the same way in every dtype that holds it."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = pixels_from_tensor(images.double(), 32)
    assert torch.equal(pixels_from_tensor(images, 32), expected)
    assert torch.equal(pixels_from_tensor(images.requires_grad_(), 32).detach(), expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_batch_equals_single_images(requires_grad: bool) -> None:
    """Also next to an image that is not finite."""
    images = torch.rand(4, 3, 37, 52, generator=torch.Generator().manual_seed(0))
    images[2, 1, 5, 5] = math.nan
    together = pixels_from_tensor(images.requires_grad_(requires_grad), 32).detach()
    for i in (0, 1, 3):
        alone = pixels_from_tensor(images[i : i + 1], 32).detach()
        assert torch.equal(together[i : i + 1], alone)
        assert together[i].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_non_finite_values_do_not_become_numbers(bad: float, requires_grad: bool) -> None:
    images = torch.rand(1, 3, 8, 8)
    images[0, 0, 3, 3] = bad
    assert pixels_from_tensor(images.requires_grad_(requires_grad), 16).isnan().any()


def test_layout_of_memory_does_not_matter() -> None:
    images = torch.rand(2, 3, 20, 31)
    expected = pixels_from_tensor(images, 24)
    for requires_grad in (False, True):
        for other in (
            images.contiguous(memory_format=torch.channels_last),
            images.transpose(2, 3).contiguous().transpose(2, 3),
            images.flip(3).flip(3),
        ):
            pixels = pixels_from_tensor(other.requires_grad_(requires_grad), 24)
            assert torch.equal(pixels.detach(), expected)
            assert pixels.is_contiguous()


def test_a_matrix_cached_in_inference_mode_still_trains() -> None:
    resize_matrix.build_matrix.cache_clear()
    preprocessing._build_constants.cache_clear()
    images = torch.rand(1, 3, 9, 7)
    with torch.inference_mode():
        preprocessing.normalise(preprocessing._resize_with_matrices(images, 12))
    images.requires_grad_()
    pixels_from_tensor(images, 12).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


@pytest.mark.parametrize("requires_grad", [False, True])
def test_ambient_settings_of_torch_do_not_matter(requires_grad: bool) -> None:
    """autocast, default dtype, default device: each would change a value or fail."""
    images = torch.rand(1, 3, 30, 41, requires_grad=requires_grad)
    expected = pixels_from_tensor(images, 24)
    resize_matrix.build_matrix.cache_clear()
    preprocessing._build_constants.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        torch.set_default_dtype(torch.float16)
        try:
            pixels = pixels_from_tensor(images, 24)
            from_pil = pixels_from_pil(random_image(8, 9, seed=0), 24)
        finally:
            torch.set_default_dtype(torch.float32)
    assert pixels.dtype == from_pil.dtype == torch.float32
    assert torch.equal(pixels, expected)
    assert torch.equal(from_pil, pixels_from_pil(random_image(8, 9, seed=0), 24))


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(pixels_from_tensor, backend="eager", fullgraph=True)
    for shape in ((2, 3, 30, 41), (1, 1, 41, 30), (2, 3, 24, 24)):
        images = torch.rand(shape)
        assert torch.equal(compiled(images, 24), pixels_from_tensor(images, 24))


def test_export_leaves_no_fake_tensor_behind() -> None:
    class Preprocess(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return pixels_from_tensor(images, 24)

    resize_matrix.build_matrix.cache_clear()
    preprocessing._build_constants.cache_clear()
    images = torch.rand(1, 3, 30, 41)
    exported = torch.export.export(Preprocess(), (images,), strict=False).module()
    expected = pixels_from_tensor(images.clone().requires_grad_(), 24).detach()
    assert torch.equal(exported(images), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_gives_the_same_bits_without_waiting() -> None:
    for shape in ((2, 3, 700, 33), (1, 1, 500, 800), (3, 3, 448, 448)):
        images = torch.rand(shape)
        on_gpu = images.cuda()
        pixels_from_tensor(on_gpu)  # fills the caches, which copies from the host
        torch.cuda.set_sync_debug_mode("error")
        try:
            pixels, flags = pixels_from_tensor(on_gpu), values_in_range(on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert flags.all()
        assert torch.equal(pixels.cpu(), pixels_from_tensor(images))


def slow_matrix(in_size: int, out_size: int) -> np.ndarray:
    """The bicubic filter (a = -0.5) written with loops and without fixed point."""
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    matrix = np.zeros((out_size, in_size))
    for row in range(out_size):
        center = (row + 0.5) * scale
        for column in range(in_size):
            x = abs(column + 0.5 - center) / stretch
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
    images = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)
    images.requires_grad_()
    upstream = torch.randn(2, 3, size, size, generator=generator)
    pixels_from_tensor(images, size).backward(upstream)

    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    matrix = torch.from_numpy(slow_matrix(side, size))
    down, across = matrix[:, top : top + height], matrix[:, left : left + width]
    scaled = upstream.double() / torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)
    expected = down.T @ scaled @ across
    if channels == 1:
        expected = expected.sum(dim=1, keepdim=True)
    further_out = (images < 0) & (expected > 0) | (images > 1) & (expected < 0)
    torch.testing.assert_close(images.grad, expected.masked_fill(further_out, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_outside_the_range_only_leads_back(dtype: torch.dtype, sign: int) -> None:
    """What is minimised grows with the values (`sign` 1) or falls; the ends of the range belong to it."""
    images = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5]).view(1, 1, 1, 5).expand(1, 3, 5, 5)
    images = images.to(dtype).clone().requires_grad_()
    pixels = pixels_from_tensor(images, 8)
    (sign * pixels).sum().backward()
    assert images.grad is not None and images.grad.dtype == dtype
    assert images.grad.isfinite().all()
    descends = (-images.grad).sign()[0, 0, 0].tolist()
    assert descends == ([0, -1, -1, -1, -1] if sign == 1 else [1, 1, 1, 1, 0])
    clamped = pixels_from_tensor(images.detach().clamp(0, 1), 8)
    assert torch.equal(pixels.detach(), clamped)


def test_gradient_of_a_network_that_overshoots_passes_through_vmap() -> None:
    """`torch.func`, for gradients per image."""
    images = 3 * torch.rand(4, 3, 6, 7, generator=torch.Generator().manual_seed(0)) - 1

    def total(image: torch.Tensor) -> torch.Tensor:
        return pixels_from_tensor(image[None], 8).square().sum()

    each = torch.stack([torch.func.grad(total)(image) for image in images])
    leaf = images.clone().requires_grad_()
    pixels_from_tensor(leaf, 8).square().sum().backward()
    torch.testing.assert_close(each, leaf.grad)


@pytest.mark.parametrize("height,width,size", [(9, 14, 8), (14, 9, 20), (12, 12, 12)])
def test_smooth_path_is_the_exact_one_without_rounding(height: int, width: int, size: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = 0.4 + 0.2 * images  # so that the filter, which overshoots, does not reach what the exact path clips
    smooth, exact = (pixels_from_tensor(images, size, exact=choice) for choice in (False, True))
    assert (smooth.dtype, exact.dtype) == (torch.float64, torch.float32)
    assert 0 < (smooth - exact).abs().max() < 2 / 255 / min(STD)


def test_gradient_of_the_exact_path_is_that_of_the_smooth_one() -> None:
    images = torch.rand(2, 3, 9, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    upstream = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for exact in (True, False):
        leaf = images.clone().requires_grad_()
        pixels_from_tensor(leaf, 8, exact=exact).backward(upstream.float() if exact else upstream)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert torch.autograd.gradcheck(
        lambda leaf: pixels_from_tensor(leaf, 8, exact=False), images[:1].clone().requires_grad_()
    )


def test_gradient_descent_reaches_a_target() -> None:
    """What a quality loss does with it, starting outside the range."""
    target = pixels_from_tensor(torch.full((1, 3, 6, 6), 0.5), 8)
    images = torch.full((1, 3, 6, 6), 1.3, requires_grad=True)
    optimiser = torch.optim.Adam([images], lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        (pixels_from_tensor(images, 8) - target).square().mean().backward()
        optimiser.step()
    assert (images - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    "images,words",
    [
        ([[0.5]], ["images must be a torch.Tensor (B, 3 or 1, H, W), got list", "Scorer"]),
        (np.zeros((1, 3, 4, 4)), ["got ndarray"]),
        (torch.rand(3, 4, 4), ["4 axes", "got shape (3, 4, 4)", "images[None]"]),
        (torch.rand(4, 4), ["4 axes", "got shape (4, 4)", "reshape"]),
        (torch.rand(1, 1, 3, 4, 4), ["4 axes", "got shape (1, 1, 3, 4, 4)"]),
        (torch.rand(1, 4, 5, 5), ["1 or 3 channels", "(1, 4, 5, 5)", "images[:, :3]"]),
        (torch.rand(1, 5, 6, 3), ["1 or 3 channels", "(1, 5, 6, 3)", "second axis"]),
        (torch.rand(1, 0, 6, 3), ["1 or 3 channels", "(1, 0, 6, 3)"]),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ["torch.uint8", "divide by 255"]),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), ["torch.int64", "divide by 255"]),
        (torch.zeros(1, 3, 4, 4, dtype=torch.bool), ["torch.bool", "images.float()"]),
        (torch.zeros(1, 3, 4, 4, dtype=torch.complex64), ["torch.complex64", "float32"]),
        (torch.rand(0, 3, 4, 4), ["at least one image", "(0, 3, 4, 4)"]),
        (torch.rand(1, 3, 0, 4), ["its size is 4x0", "1 to 65535"]),
        (torch.rand(1, 3, 4, 0), ["its size is 0x4", "1 to 65535"]),
        (torch.rand(1, 1, 1, 65_536), ["its size is 65536x1", "crop or downscale"]),
    ],
)
def test_wrong_tensors_are_refused(images: object, words: list[str]) -> None:
    for function in (check_images, pixels_from_tensor):
        with pytest.raises(ImageError) as caught:
            function(images)
        for word in ["images", *words]:
            assert word in str(caught.value)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_in_range(dtype: torch.dtype) -> None:
    images = torch.rand(9, 3, 5, 6).to(dtype)
    for i, value in enumerate([0.0, 1.0, math.nan, math.inf, -math.inf, -0.01, 1.01, 2e4]):
        images[i, 1, 2, 3] = value
    flags = values_in_range(images)
    assert flags.dtype == torch.bool
    assert flags.tolist() == [True, True, False, False, False, False, False, False, True]


def test_values_in_range_tolerance() -> None:
    images = torch.full((4, 1, 1, 1), 0.5, dtype=torch.float64)
    images[:, 0, 0, 0] = torch.tensor([-0.9e-6, 1 + 0.9e-6, -2e-6, 1 + 2e-6], dtype=torch.float64)
    assert values_in_range(images).tolist() == [True, True, False, False]
    assert values_in_range(images, tolerance=1e-3).all()
    assert not values_in_range(images, tolerance=0.0).any()
    assert not values_in_range(images.requires_grad_()).requires_grad
