"""Preprocessing against the published results, against Pillow itself, and on bad input."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from safetensors.torch import load_file

from pyiqa_qscorer import preprocessing
from pyiqa_qscorer.errors import ImageError
from pyiqa_qscorer.preprocessing import (
    MEAN,
    PAD_COLOR,
    STD,
    check_images,
    open_image,
    pixels_from_pil,
    pixels_from_tensor,
    values_in_range,
)

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


# --- helpers ----------------------------------------------------------------------------------


def random_image(height: int, width: int, seed: int, *, harsh: bool = False) -> Image.Image:
    """Noise; harsh: only 0 and 255, so that the bicubic filter overshoots and must be clipped."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.where(values < 128, 0, 255).astype(np.uint8) if harsh else values)


def to_tensor(image: Image.Image, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As torchvision's and pyiqa's to_tensor: (1, C, H, W), k / 255."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return (values.float() / 255 if dtype == torch.float32 else values.double() / 255).to(dtype)


def plain_levels(image: Image.Image, size: int) -> np.ndarray:
    """Padded on a full canvas and resized in one call: the published steps, literally."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, (0, (width - height) // 2) if width > height else ((height - width) // 2, 0))
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))


def plain_pixels(image: Image.Image, size: int = 448) -> torch.Tensor:
    """The published rescale and normalisation, with numpy."""
    scaled = (plain_levels(image, size) * 0.00392156862745098).astype(np.float32)
    normalised = (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(normalised).permute(2, 0, 1)


def matrix_levels(images: torch.Tensor, size: int) -> np.ndarray:
    """(1, 3, H, W) through the matrices, also where Pillow would be used: (size, size, 3)."""
    return preprocessing._resize_with_matrices(images, size)[0].permute(1, 2, 0).numpy()


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG by hand: Pillow cannot write 16-bit colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


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


# --- the published results --------------------------------------------------------------------


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
        size={"shortest_edge": 448},
        crop_size={"height": 448, "width": 448},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    expected = processor(square, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels_from_pil(image), expected)
    assert torch.equal(pixels_from_tensor(to_tensor(image))[0], expected)


# --- the resize equals Pillow's ---------------------------------------------------------------


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


@pytest.mark.parametrize("height,width", [(1, 1), (2, 2), (3, 3), (1, 700), (700, 1), (33, 700)])
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


def test_long_thin_images_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their padded square would have 1.6 thousand million pixels; nothing near it is built."""
    largest = 0
    new = Image.new

    def watched(mode: str, size: tuple[int, int], color: object = 0) -> Image.Image:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return new(mode, size, color)

    monkeypatch.setattr(Image, "new", watched)
    image = random_image(2, 40_000, seed=0)
    pixels = pixels_from_pil(image)
    assert largest <= 40_000 * 448
    assert torch.equal(pixels_from_tensor(to_tensor(image).requires_grad_())[0].detach(), pixels)


@pytest.mark.parametrize("in_size", [1, 3, 447, 448, 449, 1000, 4000, 65_535])
def test_padding_keeps_its_colour(in_size: int) -> None:
    """Both resizes lean on it: rows of nothing but padding are not resized in the first pass."""
    row_sums = preprocessing._resize_matrix(in_size, 448).sum(axis=1)
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


# --- tensors: dtypes, batches, contexts -------------------------------------------------------


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


def test_gray_is_repeated() -> None:
    gray = torch.rand(2, 1, 20, 31, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pixels_from_tensor(gray, 24), pixels_from_tensor(gray.repeat(1, 3, 1, 1), 24))


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


def test_input_is_not_changed() -> None:
    images = torch.rand(1, 3, 9, 7)
    image = random_image(9, 7, seed=0)
    before, bytes_before = images.clone(), image.tobytes()
    pixels_from_tensor(images)
    pixels_from_pil(image)
    assert torch.equal(images, before)
    assert image.tobytes() == bytes_before


def test_a_matrix_cached_in_inference_mode_still_trains() -> None:
    preprocessing._build_matrix.cache_clear()
    preprocessing._build_constants.cache_clear()
    images = torch.rand(1, 3, 9, 7)
    with torch.inference_mode():
        preprocessing._normalise(preprocessing._resize_with_matrices(images, 12))
    images.requires_grad_()
    pixels_from_tensor(images, 12).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


@pytest.mark.parametrize("requires_grad", [False, True])
def test_ambient_settings_of_torch_do_not_matter(requires_grad: bool) -> None:
    """autocast, default dtype, default device: each would change a value or fail."""
    images = torch.rand(1, 3, 30, 41, requires_grad=requires_grad)
    expected = pixels_from_tensor(images, 24)
    preprocessing._build_matrix.cache_clear()
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

    preprocessing._build_matrix.cache_clear()
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


# --- gradient ---------------------------------------------------------------------------------


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
    """Also where a value is rounded, clipped by the filter, or outside [0, 1]."""
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
    torch.testing.assert_close(images.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_outside_the_range_is_alive(dtype: torch.dtype) -> None:
    images = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5]).view(1, 1, 1, 5).expand(1, 3, 5, 5)
    images = images.to(dtype).clone().requires_grad_()
    pixels = pixels_from_tensor(images, 8)
    pixels.sum().backward()
    assert images.grad is not None and images.grad.dtype == dtype
    assert images.grad.isfinite().all() and (images.grad > 0).all()
    clamped = pixels_from_tensor(images.detach().clamp(0, 1), 8)
    assert torch.equal(pixels.detach(), clamped)


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


def test_no_gradient_is_tracked_when_none_is_asked() -> None:
    images = torch.rand(1, 3, 6, 6, requires_grad=True)
    with torch.no_grad():
        assert not pixels_from_tensor(images, 8).requires_grad
    assert not pixels_from_tensor(images.detach(), 8).requires_grad


# --- checks of tensors ------------------------------------------------------------------------


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


def test_right_tensors_pass() -> None:
    for dtype in FLOATS:
        for channels in (1, 3):
            check_images(torch.zeros(2, channels, 1, 1, dtype=dtype))


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


# --- files of every kind ----------------------------------------------------------------------


def all_routes(path: Path) -> list[Image.Image]:
    """A file read as path, str, bytes, and PIL image: they must agree."""
    with Image.open(path) as image:
        opened = [open_image(s) for s in (path, str(path), path.read_bytes(), image)]
    for image in opened:
        assert image.mode == "RGB"
        assert image.tobytes() == opened[0].tobytes()
    return opened


def saved(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize(
    "mode,name",
    [
        ("RGB", "a.png"),
        ("RGBA", "a.png"),
        ("L", "a.png"),
        ("LA", "a.png"),
        ("1", "a.png"),
        ("P", "a.png"),
        ("P", "a.gif"),
        ("RGBA", "a.webp"),
        ("CMYK", "a.tif"),
        ("CMYK", "a.jpg"),
        ("YCbCr", "a.jpg"),
        ("L", "a.jpg"),
        ("LAB", "a.tif"),
    ],
)
def test_modes_are_converted_as_pillow_does(mode: str, name: str, tmp_path: Path) -> None:
    source = random_image(12, 17, seed=3).convert(mode)
    path = saved(tmp_path, source, name)
    with Image.open(path) as image:
        expected = np.array(image.convert("RGB"))
    for image in all_routes(path):
        np.testing.assert_array_equal(np.array(image), expected)
        pixels = pixels_from_tensor(to_tensor(image), 20)[0]
        assert torch.equal(pixels_from_pil(image, 20), pixels)


def test_alpha_is_dropped_not_composited(tmp_path: Path) -> None:
    values = np.array([[[10, 20, 30, 0], [40, 50, 60, 128]]], np.uint8)
    image = all_routes(saved(tmp_path, Image.fromarray(values), "alpha.png"))[0]
    np.testing.assert_array_equal(np.array(image), values[..., :3])


def test_gray_file_equals_gray_tensor(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 14), dtype=np.uint8)
    image = all_routes(saved(tmp_path, Image.fromarray(values), "gray.png"))[0]
    tensor = torch.from_numpy(values).view(1, 1, 9, 14).float() / 255
    assert torch.equal(pixels_from_pil(image), pixels_from_tensor(tensor)[0])


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    for transparency in (0, b"\x00\x80"):
        path = saved(tmp_path, image, "palette.png", transparency=transparency)
        opened = all_routes(path)[0]
        assert np.array(opened).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_cmyk_colours(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (3, 2), (255, 0, 0, 0))
    image = all_routes(saved(tmp_path, cmyk, "cyan.tif"))[0]
    assert image.getpixel((0, 0)) == (0, 255, 255)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_rotation_is_not_applied(orientation: int, tmp_path: Path) -> None:
    image = random_image(8, 20, seed=0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, image, "rotated.png", exif=exif)
    with Image.open(path) as check:
        assert check.getexif()[0x0112] == orientation
    opened = all_routes(path)[0]
    assert opened.size == (20, 8)
    assert opened.tobytes() == image.tobytes()


@pytest.mark.parametrize("name", ["gray16.png", "gray16.tif"])
def test_16_bit_gray_is_refused(name: str, tmp_path: Path) -> None:
    """Pillow's conversion clips it to white, as it would here for nearly every value."""
    values = np.linspace(0, 65535, 20).astype(np.uint16).reshape(4, 5)
    path = saved(tmp_path, Image.fromarray(values), name)
    with Image.open(path) as image:
        clipped = np.array(image.convert("RGB"))
        assert (clipped[1:] == 255).all()
        for source in (path, path.read_bytes(), image):
            with pytest.raises(ImageError, match=r"mode 'I;16.*clip every value above 255") as e:
                open_image(source)
        assert "(numpy.asarray(image) / 257).round().astype('uint8')" in str(e.value)
        advised = Image.fromarray((np.asarray(image) / 257).round().astype("uint8"))
    assert np.array(open_image(advised))[..., 0].flatten().tolist() == [
        round(v / 257) for v in values.flatten().tolist()
    ]


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B"])
def test_deep_gray_modes_are_refused(mode: str) -> None:
    """Whatever their values: a rule that depends on the values would surprise."""
    with pytest.raises(ImageError, match=f"PIL image: mode '{mode}' has more than 8 bits"):
        open_image(Image.new(mode, (3, 3)))
    with pytest.raises(ImageError, match="more than 8 bits"):
        pixels_from_pil(Image.new(mode, (3, 3)))


@pytest.mark.parametrize("colour_type,channels", [(2, 3), (6, 4), (4, 2)])
def test_16_bit_colour_keeps_the_upper_8_bits(colour_type: int, channels: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (4, 5, channels), dtype=np.uint16)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    path = tmp_path / "colour16.png"
    path.write_bytes(png(5, 4, 16, colour_type, rows))
    upper = (values >> 8).astype(np.uint8)
    expected = upper[..., :3] if channels > 2 else upper[..., :1].repeat(3, axis=2)
    np.testing.assert_array_equal(np.array(all_routes(path)[0]), expected)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    for name in ("animated.png", "animated.gif"):
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        assert open_image(path).getpixel((2, 2)) == (255, 0, 0)
        with Image.open(path) as image:
            assert image.n_frames == 3
            image.seek(2)
            assert open_image(image).getpixel((2, 2)) == (0, 0, 255)


def test_rgb_images_are_not_copied() -> None:
    image = random_image(4, 4, seed=0)
    assert open_image(image) is image


def test_image_outlives_its_file(tmp_path: Path) -> None:
    """BMP and TIFF may be mapped from the file: the file can be deleted at once."""
    for name in ("a.bmp", "a.tif", "a.png", "a.ppm"):
        expected = random_image(9, 9, seed=0)
        path = saved(tmp_path, expected, name)
        image = open_image(path)
        path.unlink()
        assert image.tobytes() == expected.tobytes()


# --- bad files --------------------------------------------------------------------------------


def refused(source: object, *words: str) -> ImageError:
    with pytest.raises(ImageError) as caught:
        open_image(source)  # type: ignore[arg-type]
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    return caught.value


def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("nowhere.png", "image 'nowhere.png'", "no such file in", str(tmp_path), "check the path")
    refused(tmp_path / "nowhere.png", str(tmp_path / "nowhere.png"), "no such file")
    refused("", "image ''", "no such file")
    refused("with\0zero.png", "no such file")
    refused("https://example.org/a.png", "URLs are not fetched")


def test_folder_pipe_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path, str(tmp_path), "it is a folder")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "pipe.png", "not a regular file")
    path = saved(tmp_path, random_image(4, 4, seed=0), "secret.png")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root
    refused(path, "secret.png", "no permission to read")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    refused(path, "empty.jpg", "the file is empty (0 bytes)", "copy or download it again")
    refused(b"", "image given as 0 bytes", "it is empty")


@pytest.mark.parametrize("content", [b"hello, I am text", b"\x89PNG", b"\x00" * 500, b"GIF89a"])
def test_not_an_image(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "not_an_image.png"
    path.write_bytes(content)
    refused(path, "not_an_image.png", "not an image that Pillow can read")
    refused(content, f"image given as {len(content)} bytes", "not an image that Pillow can read")


@pytest.mark.parametrize("source", [None, 7, 1.5, [b"x"], np.zeros((4, 4, 3)), torch.zeros(1)])
def test_wrong_kind_of_source(source: object) -> None:
    refused(source, "source must be a path", f"got {type(source).__name__}")


FORMATS: list[tuple[str, dict]] = [
    ("PNG", {}),
    ("JPEG", {"quality": 95}),
    ("JPEG", {"quality": 95, "progressive": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("WEBP", {"lossless": True}),
    ("GIF", {}),
    ("PPM", {}),
]


@pytest.fixture(params=[False, True], ids=["strict", "tolerant"])
def pil_switch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """PIL's process-wide switch; importing pyiqa's AVA dataset sets it to True."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)
    return request.param


@pytest.mark.parametrize("file_format,options", FORMATS)
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_files(file_format: str, options: dict, kept: float, tmp_path: Path, pil_switch: bool) -> None:
    content = encoded(random_image(64, 80, seed=0), file_format, **options)
    content = content[: int(len(content) * kept)]
    path = tmp_path / "cut.image"
    path.write_bytes(content)
    refused(path, "cut.image", "copy")
    refused(content, f"image given as {len(content)} bytes")
    try:
        lazy = Image.open(path)
    except OSError:
        pass  # WebP decodes on opening
    else:
        with lazy:
            refused(lazy, "PIL image", "cut.image", "cannot be decoded")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is pil_switch


def test_truncated_message() -> None:
    content = encoded(random_image(64, 80, seed=0), "JPEG")
    error = refused(content[:-200], "OSError", "truncated", "copy or download it again")
    assert isinstance(error, ValueError)
    assert isinstance(error.__cause__, OSError)


def test_truncated_files_fail_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With PIL set to tolerate them: threads that start and end while others decode."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    content = encoded(random_image(64, 80, seed=0), "JPEG")
    outcomes: list[str] = []

    def work() -> None:
        for _ in range(20):
            open_image(content)
            try:
                open_image(content[:-500])
                outcomes.append("accepted")
            except ImageError:
                outcomes.append("refused")

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == ["refused"] * 120
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("file_format,options", FORMATS)
def test_damaged_files_never_raise_anything_else(
    file_format: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage can go unnoticed by a decoder, but what it notices must be an ImageError."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # damaged sizes can be large
    content = encoded(random_image(24, 30, seed=0), file_format, **options)
    random = np.random.default_rng(0)
    refusals = 0
    for _ in range(60):
        damaged = bytearray(content)
        for position in random.integers(0, min(len(content), 400), size=6):
            damaged[position] = random.integers(256)
        try:
            open_image(bytes(damaged))
        except ImageError:
            refusals += 1
    assert refusals > 0


@pytest.mark.filterwarnings("ignore:.*:PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(tmp_path, random_image(20, 20, seed=0), "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for source in (path, path.read_bytes()):
        refused(source, "image ", "400 pixels", "limit of 200", "raise PIL.Image.MAX_IMAGE_PIXELS")


def test_between_one_and_two_limits_pil_warns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image = random_image(20, 20, seed=0)
    path = saved(tmp_path, image, "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.warns(Image.DecompressionBombWarning):
        assert open_image(path).tobytes() == image.tobytes()


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_warning_made_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(tmp_path, random_image(20, 20, seed=0), "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    refused(path, "large.png", "400 pixels", "MAX_IMAGE_PIXELS")


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0), (65_536, 1)])
def test_impossible_sizes(size: tuple[int, int]) -> None:
    refused(Image.new("RGB", size), f"its size is {size[0]}x{size[1]}", "1 to 65535 pixels")


def test_out_of_memory_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(tmp_path, random_image(4, 4, seed=0), "a.png")

    def no_memory(self: ImageFile.ImageFile) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", no_memory)
    refused(path, "a.png", "not enough memory")


def test_closed_pil_image(tmp_path: Path) -> None:
    path = saved(tmp_path, random_image(4, 4, seed=0), "a.png")
    image = Image.open(path)
    image.close()
    refused(image, "PIL image", "a.png", "cannot be decoded")


def test_interrupts_pass_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(tmp_path, random_image(4, 4, seed=0), "a.png")

    def interrupted(self: ImageFile.ImageFile) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageFile.ImageFile, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_image(path)
    assert preprocessing._decoding_count == 0


def test_open_image_accepts_any_path_like(tmp_path: Path) -> None:
    path = saved(tmp_path, random_image(4, 4, seed=0), "ein Bild: ä.png")

    class BytesPath:
        def __fspath__(self) -> bytes:
            return os.fsencode(path)

    sources: list[Callable[[], object]] = [lambda: path, lambda: str(path), BytesPath]
    for source in sources:
        assert open_image(source()).size == (4, 4)  # type: ignore[arg-type]
