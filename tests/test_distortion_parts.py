"""What the distortions are made of, each against what it is defined as."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyiqa_qscorer.synthetic.distortions import Step, apply_chain, codecs, optics, pictures, resampling, sensor, tone

PHOTO = Path(__file__).parent / "photos" / "coffee.jpg"


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.array(Image.open(PHOTO).convert("RGB").resize((150, 101)))


def error(reference: np.ndarray, other: np.ndarray) -> float:
    return float(((reference.astype(float) - other) ** 2).mean())


def test_levels_survive_linear_light_and_sharpening_overshoots_at_edges() -> None:
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    np.testing.assert_array_equal(pictures.from_linear(pictures.to_linear(levels)), levels)
    of_128 = pictures.to_linear(levels)[8, 0, 0]  # by the standard's formula
    assert of_128 == pytest.approx(0.2158605, abs=1e-6)
    np.testing.assert_array_equal(pictures.to_levels(np.array([-0.1, 0.0, 0.5, 1.0, 1.1])), [0, 0, 128, 255, 255])
    edge = np.full((20, 40, 3), 80, np.uint8)
    edge[:, 20:] = 160
    halos = optics.sharpen(edge, 1, 1.5)
    assert halos.min() < 75 and halos.max() > 165
    np.testing.assert_allclose(halos[:, [0, -1]].astype(int), edge[:, [0, -1]], atol=1)


@pytest.mark.parametrize("radius", [1, 2.5, 8])
def test_discs_cover_their_area(radius: float) -> None:
    kernel = optics.disc_kernel(radius)
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(kernel, kernel[::-1].T)
    middle = len(kernel) // 2
    assert kernel[middle, middle] == pytest.approx(1 / (np.pi * radius**2), rel=0.03)
    if radius > 2:
        offsets = np.arange(len(kernel)) - middle
        # radius^2 / 4 of the disc and 1 / 12 of the pixels that it is sampled on.
        assert (kernel.sum(0) * offsets**2).sum() == pytest.approx(radius**2 / 4 + 1 / 12, rel=0.05)


def test_paths_are_lines_of_their_length_around_the_middle() -> None:
    np.testing.assert_array_equal(optics.path_kernel(1, 30), [[0, 0, 0], [0, 1, 0], [0, 0, 0]])
    line = optics.path_kernel(9, 0)
    row = line[len(line) // 2]
    assert row.sum() == pytest.approx(1)
    inside = row[len(row) // 2 - 3 : len(row) // 2 + 4]
    np.testing.assert_allclose(inside, 1 / 8, atol=0.005)  # 8 pixels between the centres of the ends
    for angle, bend in itertools.product((0, 33, 90, 150), (0, 100, -100)):
        kernel = optics.path_kernel(12, angle, bend)
        offsets = np.arange(len(kernel)) - len(kernel) // 2
        assert kernel.sum() == pytest.approx(1)
        if not bend:
            assert abs((kernel.sum(0) * offsets).sum()) < 1e-3 and abs((kernel.sum(1) * offsets).sum()) < 1e-3


@pytest.mark.parametrize("light", [1.0, 0.1])
def test_sensor_noise_has_its_variance_in_linear_light(light: float) -> None:
    for level in (60, 128, 200):
        flat = np.full((200, 200, 3), level, np.uint8)
        noisy = sensor.sensor_noise(flat, 1e-4, 1e-6, 0.5, 0.0, light, np.random.default_rng(0))
        exposed = float(pictures.to_linear(flat)[0, 0, 0])
        noise = pictures.to_linear(noisy) - exposed
        assert noise.var() == pytest.approx(1e-4 * exposed / light + 1e-6 / light**2, rel=0.05)
        correlation = np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]
        assert correlation == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("method", sensor.DENOISERS)
def test_denoisers_take_noise_away(method: str) -> None:
    flat = np.full((60, 60, 3), 120, np.uint8)
    noisy = sensor.sensor_noise(flat, 2e-3, 1e-5, 0.8, 0.0, 1.0, np.random.default_rng(0))
    errors = [error(flat, sensor.denoise(noisy, method, strength)) for strength in (0.1, 0.5, 1.0)]
    assert error(flat, noisy) > errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(("down", "up"), [*itertools.product(resampling.KERNELS, repeat=2)])
def test_resampling_keeps_the_place_and_the_mean(down: str, up: str, photo: np.ndarray) -> None:
    np.testing.assert_array_equal(resampling.resample(photo, 1, down, up), photo)
    ramp = np.repeat(np.linspace(20, 230, 120).astype(np.uint8)[None, :, None], 3, axis=2).repeat(60, axis=0)
    for factor in (2, 3.7):
        result = resampling.resample(ramp, factor, down, up)
        # Half a pixel of the small picture would show as 1.75 levels times the factor / 2.
        assert abs(result[:, 10:-10].mean() - ramp[:, 10:-10].mean()) < 1


def test_tone_and_banding_go_where_they_say(photo: np.ndarray) -> None:
    np.testing.assert_array_equal(tone.tone(photo), photo)
    assert tone.tone(photo, exposure=1).mean() > photo.mean() > tone.tone(photo, gamma=1.5).mean()
    spread = photo.std()
    assert tone.tone(photo, contrast=1.5).std() > spread > tone.tone(photo, contrast=0.6).std()
    gray = tone.tone(photo, saturation=0)
    assert np.ptp(gray, axis=2).max() == 0
    half = tone.tone(np.full((4, 4, 3), 200, np.uint8), exposure=-1)
    assert pictures.to_linear(half)[0, 0, 0] == pytest.approx(pictures.to_linear(np.array([200]))[0] / 2, rel=0.01)
    assert set(np.unique(tone.banding(photo, 5, "rgb"))) <= {0, 64, 128, 191, 255}
    gray = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert len(np.unique(tone.banding(gray, 7, "lightness"))) == 7


@pytest.mark.parametrize("codec", codecs.VIDEO_CODECS)
@pytest.mark.parametrize("motion", [None, (2, -3)])
def test_video_frames_come_back_in_place_and_worse_the_coarser(codec, motion, photo) -> None:
    errors = [error(photo, codecs.video(photo, codec, quantiser, motion)) for quantiser in (4, 12, 28)]
    assert errors[0] < errors[1] < errors[2]
    shifted = [
        error(np.roll(photo, shift, (0, 1)), codecs.video(photo, codec, 4, motion)) for shift in ((1, 0), (0, 1))
    ]
    assert 5 * errors[0] < min(shifted)


@pytest.mark.parametrize("codec", codecs.STILL_CODECS)
def test_still_codecs_are_worse_the_lower_the_quality(codec: str, photo: np.ndarray) -> None:
    errors = [error(photo, codecs.still(photo, codec, quality)) for quality in (90, 50, 10)]
    assert errors[0] < errors[1] < errors[2]


def test_predicted_frames_differ_from_intra_frames_and_jpeg_subsampling_costs_chroma_only(photo: np.ndarray) -> None:
    intra, predicted = (codecs.video(photo, "h264", 34, motion) for motion in (None, (3, 2)))
    assert not np.array_equal(intra, predicted)
    red = np.zeros((32, 32, 3), np.uint8)
    red[:, ::2, 0] = 255
    full, halved = (codecs.jpeg(red, 95, subsampling) for subsampling in ("4:4:4", "4:2:0"))
    assert error(red, halved) > 20 * error(red, full)


def test_a_shifted_grid_has_its_blocks_elsewhere(photo: np.ndarray) -> None:
    """Steps between neighbouring columns are largest at block borders: every eighth, moved by the shift."""
    for shift in (0, 3):
        code, clean = {"codec": "jpeg", "quality": 5}, {"codec": "jpeg", "quality": 100}
        chain = [Step("recompress", {"first": clean, "second": code, "shift": [0, shift]})]
        result = apply_chain(photo, chain, 0).astype(int).mean(2)
        steps = np.abs(np.diff(result[:, :144], axis=1)).mean(0)
        border = max(range(8), key=lambda phase: steps[phase::8].mean())
        assert (border + 1 + shift) % 8 == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda image: codecs.video(image, "theora", 5), "codec must be one of h264, mpeg4, mpeg2, got 'theora'"),
        (lambda image: codecs.still(image, "gif", 5), "codec must be one of jpeg, webp, avif, got 'gif'"),
        (lambda image: resampling.resample(image, 2, "sinc", "area"), "kernel must be one of nearest, .*got 'sinc'"),
        (lambda image: tone.banding(image, 5, "xyz"), "space must be one of rgb, lightness, got 'xyz'"),
        (lambda image: sensor.denoise(image, "wavelet", 0.5), "method must be one of bilateral, .*got 'wavelet'"),
    ],
)
def test_unknown_names_are_refused(call: Callable[[np.ndarray], object], message: str, photo: np.ndarray) -> None:
    with pytest.raises(ValueError, match=message):
        call(photo)
