"""Preprocessing against the published results and Pillow itself, in every dtype and context; what is refused."""

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
from pyiqa_qscorer.images.preprocessing import MEAN, PAD_COLOR, STD, check_images, values_in_range
from pyiqa_qscorer.images.preprocessing import pixels_from_pil as from_pil
from pyiqa_qscorer.images.preprocessing import pixels_from_tensor as from_tensor
from pyiqa_qscorer.images.reading import open_image

GOLDEN_IMAGES = ["a_rgb_512x384", "b_rgb_384x512", "c_rgb_448x448", "d_rgb_33x700", "e_gray_300x201", "f_rgba_256x400"]
GOLDEN_IMAGES += ["g_rgb_451x333", "h_rgb_1024x768", "i_rgb_7x5", "j_la_97x64", "k_p_120x90"]
GOLDEN_IMAGES += ["q_rgb_1x1", "q_rgb_3x2", "q_rgb_3x3"]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BOTH = pytest.mark.parametrize("requires_grad", [False, True])
SIDES = st.integers(1, 90)
SEEDS = st.integers(0, 2**32 - 1)


@functools.lru_cache(maxsize=1)
def reference() -> dict[str, dict]:
    path = Path(__file__).parent / "golden" / "preprocessing" / "preprocessing.json"
    return json.loads(path.read_text())["images"]


def uniform(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_as_published(pixels: torch.Tensor, name: str, golden: Path) -> None:
    assert pixels.shape == (3, 448, 448) and pixels.dtype == torch.float32 and pixels.is_contiguous()
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
        assert hashlib.sha256(pixels.half().numpy().tobytes()).hexdigest() == expected["sha256_fp16"]
    assert torch.equal(pixels.flatten()[tensors["positions"]], values)
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == sha256


@pytest.mark.parametrize("name", GOLDEN_IMAGES)
def test_files_and_tensors_as_published(name: str, golden: Path) -> None:
    path = golden / reference()[name]["file"]
    with Image.open(path) as lazy:
        for source in (path, str(path), path.read_bytes(), lazy):
            assert_as_published(from_pil(open_image(source)), name, golden)
    with Image.open(path) as unconverted:
        assert_as_published(from_pil(unconverted), name, golden)
    for dtype in FLOATS:
        images = to_tensor(open_image(path), dtype)
        assert_as_published(from_tensor(images)[0], name, golden)
        assert_as_published(from_tensor(images.requires_grad_())[0].detach(), name, golden)


def assert_equals_pillow(image: Image.Image, size: int) -> None:
    images, pixels = to_tensor(image), plain_pixels(image, size)
    np.testing.assert_array_equal(matrix_levels(images, size), plain_levels(image, size))
    assert torch.equal(from_pil(image, size), pixels) and torch.equal(from_tensor(images, size)[0], pixels)
    assert torch.equal(from_tensor(images.requires_grad_(), size)[0].detach(), pixels)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES, size=st.integers(1, 100), seed=SEEDS, harsh=st.booleans())
def test_any_size_equals_pillow(height: int, width: int, size: int, seed: int, harsh: bool) -> None:
    assert_equals_pillow(random_image(height, width, seed, harsh=harsh), size)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(long=st.integers(20, 700), short=st.integers(1, 12), size=st.integers(1, 200), seed=SEEDS, tall=st.booleans())
def test_narrow_images_equal_pillow(long: int, short: int, size: int, seed: int, tall: bool) -> None:
    image = random_image(*((long, short) if tall else (short, long)), seed, harsh=seed % 2 == 0)
    levels = preprocessing.levels_from_pil(image, size).permute(1, 2, 0)
    np.testing.assert_array_equal(levels, plain_levels(image, size))


TINY_AND_THIN = [(1, 1), (2, 2), (3, 3), (6, 9), (6, 10), (10, 6), (8, 7)]
TINY_AND_THIN += [(1, 700), (700, 1), (33, 700), (64, 1), (64, 7), (5000, 3)]
NEAR_448 = [(447, 448), (448, 447), (449, 449), (224, 224), (600, 1201), (1201, 700), (31, 2500)]


@pytest.mark.parametrize("harsh", [False, True])
@pytest.mark.parametrize("height,width", [*TINY_AND_THIN, *NEAR_448])
def test_448_equals_pillow(height: int, width: int, harsh: bool) -> None:
    image = random_image(height, width, seed=width, harsh=harsh)
    assert_equals_pillow(image, 448)
    if max(height, width) < 100:  # at the size of the square no value is resampled: the paste itself shows
        assert_equals_pillow(image, max(height, width))


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
    gone_through, resize = [], Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *options: object) -> Image.Image:
        gone_through.append(self.width * self.height)
        return resize(self, size, *options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    image = random_image(*shape, seed=0)
    pixels = from_pil(image)
    assert sum(gone_through) <= 40_000 * 450
    if shape[0] < shape[1]:
        assert torch.equal(from_tensor(to_tensor(image).requires_grad_())[0].detach(), pixels)


@pytest.mark.parametrize("in_size", [1, 3, 447, 448, 449, 1000, 4000, 65_535])
def test_padding_keeps_its_colour(in_size: int) -> None:
    """Both resizes lean on it: rows of nothing but padding are not resized in the first pass."""
    row_sums = resize_matrix.resize_matrix(in_size, 448).sum(axis=1)
    for level in (*PAD_COLOR, 255):
        np.testing.assert_array_equal(np.floor(level * row_sums + 0.5), level)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_8_bit_value_survives_every_dtype_and_halves_go_one_way(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.float64)
    for values in ((levels / 255).to(dtype), levels.to(dtype) / 255):
        assert torch.equal(preprocessing._to_levels(values), levels)
        image = preprocessing._to_pil(values.view(1, 16, 16).expand(3, 16, 16))
        assert torch.equal(torch.from_numpy(np.array(image))[..., 0].flatten().double(), levels)
    # A value halfway between two levels goes the same way in every dtype that holds it.
    images = uniform(1, 3, 64, 64, dtype=dtype)
    expected = from_tensor(images.double(), 32)
    assert torch.equal(from_tensor(images, 32), expected)
    assert torch.equal(from_tensor(images.requires_grad_(), 32).detach(), expected)


@pytest.mark.parametrize("size", [4, 6, 11])
@BOTH
def test_values_are_rounded_and_clamped_before_the_resize(requires_grad: bool, size: int) -> None:
    steps = torch.tensor([10.4, 10.6, 0.4, 254.6, -300.0, 700.0, 1e20], dtype=torch.float64)
    levels = torch.tensor([10.0, 11.0, 0.0, 255.0, 0.0, 255.0, 255.0], dtype=torch.float64)
    given, rounded = (
        from_tensor((x / 255).view(1, 1, 1, -1).requires_grad_(requires_grad), size).detach() for x in (steps, levels)
    )
    assert torch.equal(given, rounded)


@BOTH
def test_batch_equals_single_images(requires_grad: bool) -> None:
    """Also next to an image that is not finite, which does not become numbers."""
    for bad in (math.nan, math.inf, -math.inf):
        images = uniform(4, 3, 37, 52)
        images[2, 1, 5, 5] = bad
        together = from_tensor(images.requires_grad_(requires_grad), 32).detach()
        assert together[2].isnan().any()
        for i in (0, 1, 3):
            assert torch.equal(together[i : i + 1], from_tensor(images[i : i + 1], 32).detach())
            assert together[i].isfinite().all()


def clear_caches() -> None:
    resize_matrix.build_matrix.cache_clear()
    preprocessing._build_constants.cache_clear()


@BOTH
def test_layout_of_memory_and_settings_of_torch_do_not_matter(requires_grad: bool) -> None:
    """autocast, default dtype, default device: each would change a value or fail."""
    images, picture = uniform(2, 3, 20, 31), random_image(8, 9, seed=0)
    expected, pixels = from_tensor(images, 24), from_pil(picture, 24)
    flipped = (images.transpose(2, 3).contiguous().transpose(2, 3), images.flip(3).flip(3))
    for other in (images.contiguous(memory_format=torch.channels_last), *flipped):
        found = from_tensor(other.requires_grad_(requires_grad), 24)
        assert torch.equal(found.detach(), expected) and found.is_contiguous()
    clear_caches()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        torch.set_default_dtype(torch.float16)
        try:
            found, again = from_tensor(images.requires_grad_(requires_grad), 24), from_pil(picture, 24)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found.dtype == again.dtype == torch.float32
    assert torch.equal(found.detach(), expected) and torch.equal(again, pixels)


def test_a_matrix_cached_in_inference_mode_still_trains() -> None:
    clear_caches()
    images = uniform(1, 3, 9, 7)
    with torch.inference_mode():
        preprocessing.normalise(preprocessing._resize_with_matrices(images, 12))
    images.requires_grad_()
    from_tensor(images, 12).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_compiles_as_one_graph_and_export_leaves_no_fake_tensor_behind() -> None:
    class Preprocess(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return from_tensor(images, 24)

    compiled = torch.compile(from_tensor, backend="eager", fullgraph=True)
    for shape in ((2, 3, 30, 41), (1, 1, 41, 30), (2, 3, 24, 24)):
        assert torch.equal(compiled(uniform(*shape), 24), from_tensor(uniform(*shape), 24))
    clear_caches()
    images = uniform(1, 3, 30, 41)
    exported = torch.export.export(Preprocess(), (images,), strict=False).module()
    assert torch.equal(exported(images), from_tensor(images.clone().requires_grad_(), 24).detach())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_gives_the_same_bits_without_waiting() -> None:
    for shape in ((2, 3, 700, 33), (1, 1, 500, 800), (3, 3, 448, 448)):
        images = torch.rand(shape)
        on_gpu = images.cuda()
        from_tensor(on_gpu)  # fills the caches, which copies from the host
        torch.cuda.set_sync_debug_mode("error")
        try:
            pixels, flags = from_tensor(on_gpu), values_in_range(on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert flags.all() and torch.equal(pixels.cpu(), from_tensor(images))


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
    for function in (check_images, from_tensor):
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
    assert not values_in_range(images.requires_grad_()).requires_grad
