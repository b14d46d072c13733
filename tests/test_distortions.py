"""Distortions for training: reproducible, in range, and worse where they claim to be."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from pyiqa_qscorer.synthetic.distortions import (
    CHAIN_STEPS,
    KADID_TYPES,
    Step,
    apply_chain,
    kadid_distortion,
    random_chain,
    single_step,
)

PHOTOS = Path(__file__).parent / "photos"
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
RANDOM_TYPES = {3, 5, 11, 12, 13, 14, 15, 19, 20, 23}
"""Types of KADID-10k whose result depends on the seed."""
NOT_ORDERED = {18, 25}


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """The clean photos, a part of each: (192, 256, 3)."""
    pictures = [Image.open(PHOTOS / f"{name}.jpg").convert("RGB") for name in ("astronaut", "cat", "coffee")]
    return [np.array(picture.resize((256, 192))) for picture in pictures]


def similarity(reference: np.ndarray, distorted: np.ndarray) -> float:
    return structural_similarity(reference, distorted, channel_axis=2)


def mean_similarity(photos: list[np.ndarray], distort: Callable[[np.ndarray, int], np.ndarray]) -> float:
    return float(np.mean([similarity(photo, distort(photo, seed)) for seed, photo in enumerate(photos)]))


def check(image: np.ndarray, distort: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Shape and dtype stay, the input is untouched, a second call gives the same."""
    before, result = image.copy(), distort(image)
    assert result.shape == image.shape and result.dtype == np.uint8 and not np.shares_memory(result, image)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(distort(image), result)
    return result


SIZES = [(17, 23), (1, 1), (9, 64)]


def pictures_of_odd_kinds() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    ramp = np.repeat(np.linspace(0, 255, 40 * 50).astype(np.uint8).reshape(40, 50, 1), 3, axis=2)
    return [*noise, ramp, np.zeros((33, 20, 3), np.uint8), np.full((20, 33, 3), 255, np.uint8)]


@pytest.mark.parametrize("kind", KADID_TYPES)
def test_kadid_types_take_every_picture_and_depend_on_the_seed_where_they_are_random(kind, photos) -> None:
    for image in pictures_of_odd_kinds():
        for level in (1, 5):
            check(image, lambda picture, level=level: kadid_distortion(picture, kind, level, 3))
    first, second = (kadid_distortion(photos[0], kind, 5, seed) for seed in (1, 2))
    assert np.array_equal(first, second) != (kind in RANDOM_TYPES)


@pytest.mark.parametrize("kind", sorted(set(KADID_TYPES) - NOT_ORDERED))
def test_kadid_levels_are_ordered(kind: int, photos: list[np.ndarray]) -> None:
    means = [
        mean_similarity(photos, lambda photo, seed, level=level: kadid_distortion(photo, kind, level, seed))
        for level in range(1, 6)
    ]
    assert all(weaker > stronger for weaker, stronger in itertools.pairwise(means)), means


def test_kadid_tone_blur_colour_and_quantisation_do_what_the_table_says(photos: list[np.ndarray]) -> None:
    for photo in photos:
        means = [kadid_distortion(photo, 18, level, 0).mean() for level in range(1, 6)]
        assert sorted(means, reverse=True) == means
        np.testing.assert_array_equal(kadid_distortion(photo, 18, 3, 0), photo)
        deviations = [kadid_distortion(photo, 25, level, 0).std() for level in range(1, 6)]
        assert sorted(deviations) == deviations and deviations[2] < photo.std() < deviations[3]
        assert np.argmin(np.abs(deviations - photo.std())) == 2
    for kind in (1, 2, 3):
        blurred = kadid_distortion(photos[1], kind, 5, 0)
        assert blurred.mean() == pytest.approx(photos[1].mean(), abs=0.5)
    gray = np.repeat(photos[0][..., :1], 3, axis=2)
    for kind in (4, 7, 8):
        changed = kadid_distortion(gray, kind, 5, 0).astype(int) - gray
        assert np.abs(changed).max() <= 2  # Lab and back in float32, times 12
    for level, values in enumerate((20, 16, 13, 10, 7), 1):
        result = kadid_distortion(photos[0], 22, level, 0)
        assert all(len(np.unique(result[..., channel])) <= values for channel in range(3))
    for level, colours in enumerate((64, 48, 32, 16, 8), 1):
        result = kadid_distortion(photos[0], 6, level, 0)
        assert 2 < len(np.unique(result.reshape(-1, 3), axis=0)) <= colours


def test_kadid_noise_has_the_variance_of_the_table() -> None:
    gray = np.full((400, 400, 3), 128, np.uint8)
    tables = {11: (0.001, 0.002, 0.003, 0.005, 0.01), 14: (0.001, 0.005, 0.01, 0.02, 0.05)}
    for level in range(1, 6):
        added = (kadid_distortion(gray, 11, level, 0) - 128.0) / 255
        multiplied = kadid_distortion(gray, 14, level, 0) / 128 - 1
        for kind, noise in ((11, added), (14, multiplied)):
            assert noise.var() == pytest.approx(tables[kind][level - 1], rel=0.03)
        changed = (kadid_distortion(gray, 13, level, 0) != 128).mean()
        assert changed == pytest.approx((0.001, 0.005, 0.01, 0.02, 0.03)[level - 1], rel=0.15)


@pytest.mark.parametrize("kind", CHAIN_STEPS)
def test_steps_take_every_picture_and_are_worse_the_stronger(kind: str, photos: list[np.ndarray]) -> None:
    for image in pictures_of_odd_kinds():
        for strength in (0.0, 1.0):
            step = single_step(kind, strength)
            check(image, lambda picture, step=step: apply_chain(picture, [step], 3))
    means = [
        mean_similarity(photos, lambda photo, seed, s=strength: apply_chain(photo, [single_step(kind, s)], seed))
        for strength in STRENGTHS
    ]
    assert all(weaker > stronger for weaker, stronger in itertools.pairwise(means)), means
    assert means[0] > 0.9


def test_every_choice_of_every_step_works(photos: list[np.ndarray]) -> None:
    """Chains name all kinds, and no drawn kernel, codec or method fails."""
    seen: set[str] = set()
    choices: dict[tuple[str, str], set[str]] = {}
    small = photos[0][:48, :64]
    for seed in range(300):
        chain = random_chain(seed)
        assert 1 <= len(chain) <= 4
        result = apply_chain(small, chain, seed)
        assert result.shape == small.shape
        seen |= {step.kind for step in chain}
        for step in chain:
            for name, value in step.parameters.items():
                if isinstance(value, str):
                    choices.setdefault((step.kind, name), set()).add(value)
    assert seen == set(CHAIN_STEPS)
    assert all(len(values) > 1 for values in choices.values()), choices


def test_chains_repeat_and_are_worse_the_stronger(photos: list[np.ndarray]) -> None:
    assert random_chain(5) == random_chain(5)
    for seed in range(40):  # also from JSON
        chain = random_chain(seed)
        read = [Step(**step) for step in json.loads(json.dumps([dataclasses.asdict(step) for step in chain]))]
        assert read == chain
        np.testing.assert_array_equal(apply_chain(photos[1], read, seed), apply_chain(photos[1], chain, seed))
    assert len({json.dumps([dataclasses.asdict(step) for step in random_chain(seed)]) for seed in range(50)}) == 50
    noise = [single_step("sensor_noise", 0.5)]
    assert not np.array_equal(apply_chain(photos[0], noise, 1), apply_chain(photos[0], noise, 2))
    # The same noise twice in a chain would be no second noise.
    once, twice = apply_chain(photos[0], noise, 1), apply_chain(photos[0], noise * 2, 1)
    assert np.abs(twice.astype(int) - photos[0]).mean() < 1.8 * np.abs(once.astype(int) - photos[0]).mean()
    means = []
    for strength in STRENGTHS:
        scores = [
            similarity(photos[seed % 3], apply_chain(photos[seed % 3], random_chain(seed, strength), seed))
            for seed in range(40)
        ]
        means.append(np.mean(scores))
    assert all(weaker > stronger + 0.03 for weaker, stronger in itertools.pairwise(means)), means
    assert means[0] > 0.93


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda image: kadid_distortion(image, 26, 1, 0), r"kind must be .* 1\.\.25, got 26"),
        (lambda image: kadid_distortion(image, 0, 1, 0), "kind must be"),
        (lambda image: kadid_distortion(image, 1, 6, 0), r"level must be 1\.\.5, got 6"),
        (lambda image: kadid_distortion(image / 255, 1, 1, 0), "uint8 array, got float64"),
        (lambda image: kadid_distortion(image[..., 0], 1, 1, 0), r"\(H, W, 3\) RGB, got \(20, 20\)"),
        (lambda image: kadid_distortion(image[:0], 1, 1, 0), r"got \(0, 20, 3\)"),
        (lambda image: apply_chain(image.tolist(), [], 0), "uint8 array, got list"),
        (lambda image: apply_chain(image, [Step("fog", {})], 0), "kind must be one of gaussian_blur, .*got 'fog'"),
        (lambda image: apply_chain(image, [Step("denoise", {"method": "x", "strength": 1})], 0), "method must be one"),
        (lambda image: single_step("fog", 0.5), "kind must be one of"),
        (lambda image: single_step("jpeg", 1.5), r"strength must be in \[0, 1\], got 1.5"),
        (lambda image: random_chain(0, -0.1), r"strength must be in \[0, 1\], got -0.1"),
        (lambda image: random_chain(0, float("nan")), "strength must be in"),
    ],
)
def test_errors_say_what_to_do(call: Callable[[np.ndarray], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.zeros((20, 20, 3), np.uint8))
