"""Scores of pictures that no photo looks like, beside clean photos: `python benchmarks/sanity.py [METRIC]`.

A learned metric says something about every input. This table shows what: a flat or artificial picture that scores like
a good photo is a case in which the number must not be trusted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pyiqa_qscorer import Scorer

PHOTOS = Path(__file__).resolve().parents[1] / "tests" / "photos"
CLEAN = ("astronaut.jpg", "cat.jpg", "coffee.jpg")
SIZE = 448


def flat(value: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), value, np.uint8)


def text() -> np.ndarray:
    """Black lines of text on white, the letters of Pillow's own font."""
    page = Image.new("RGB", (SIZE, SIZE), "white")
    drawing = ImageDraw.Draw(page)
    for line in range(20, SIZE - 20, 16):
        drawing.text((20, line), "The quick brown fox jumps over the lazy dog. 0123456789", fill="black")
    return np.asarray(page)


def pictures() -> dict[str, np.ndarray]:
    """Name -> uint8 (448, 448, 3), RGB; the same at every call."""
    chance = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    ramp = np.linspace(0, 255, SIZE).round().astype(np.uint8)
    across = np.repeat(np.tile(ramp, (SIZE, 1))[..., None], 3, axis=2)
    colours = np.stack([across[..., 0], across[..., 0].T, across[:, ::-1, 0]], axis=2)
    return {
        "black": flat(0),
        "gray": flat(128),
        "white": flat(255),
        "noise, uniform": chance.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
        "noise, gray": np.repeat(chance.normal(128, 25, (SIZE, SIZE, 1)).clip(0, 255).astype(np.uint8), 3, axis=2),
        **{
            f"checkerboard, {side} px": np.repeat(
                ((rows // side + columns // side) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2
            )
            for side in (1, 8, 56)
        },
        "text": text(),
        "gradient, gray": across,
        "gradient, colour": colours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="scores of artificial pictures beside clean photos")
    parser.add_argument("metric", nargs="?", default="qscorer-mini", help="a metric name of this package")
    parser.add_argument("--device", help="cpu, cuda, ...; default cuda if there, else cpu")
    arguments = parser.parse_args()
    made = pictures()
    scorer = Scorer(arguments.metric, device=arguments.device, batch_size=4)
    scores = scorer.score([*made.values(), *(PHOTOS / name for name in CLEAN)])
    names = [*made, *(f"photo: {name}" for name in CLEAN)]
    print(f"| picture | {arguments.metric} |\n| --- | --- |")
    for name, score in sorted(zip(names, scores.tolist(), strict=True), key=lambda pair: pair[1]):
        print(f"| {name} | {score:.2f} |")


if __name__ == "__main__":
    main()
