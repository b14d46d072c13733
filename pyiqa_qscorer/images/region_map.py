"""Where in a picture the quality is low: overlapping crops, the map that their scores make, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

Box = tuple[int, int, int, int]  # left, top, right, bottom
CELLS = 12  # rows and columns of a map
VEIL = (222, 60, 0)  # over the worst cells; seen by people who do not tell red from green, too
OPACITY = 0.7
LEAST_RANGE = 0.5  # of scores, that a full veil stands for: smaller differences inside a picture stay faint


@dataclass(frozen=True)
class RegionMap:
    """Score of a picture, and its regions' `values` (CELLS, CELLS), float32, top left first.

    A value is the mean score of the crops that cover a cell, each scored as a picture of its own.
    """

    score: float
    values: np.ndarray

    @property
    def worst(self) -> tuple[float, float]:
        """Centre (x, y) of the worst cell, as shares of width and height."""
        row, column = np.unravel_index(int(self.values.argmin()), self.values.shape)
        return (column + 0.5) / CELLS, (row + 0.5) / CELLS

    def overlay(self, picture: Image.Image, side: int = 1024) -> Image.Image:
        """The picture in grey, at most `side` pixels, veiled where its quality is low, and a bar that says how low."""
        shown = picture.convert("L").convert("RGB")  # on its own colours a veil could not be told from them
        shown.thumbnail((side, side))
        low, high = float(self.values.min()), float(self.values.max())
        shares = (high - self.values) / max(high - low, LEAST_RANGE)
        opacity = Image.fromarray((255 * OPACITY * shares).round().astype(np.uint8))
        veil = Image.new("RGB", shown.size, VEIL)
        mixed = Image.composite(veil, shown, opacity.resize(shown.size, Image.Resampling.BICUBIC))
        return _with_bar(mixed, high, high - max(high - low, LEAST_RANGE), self.score)


def crop_boxes(width: int, height: int, per_side: int = 5, share: float = 1 / 3) -> list[Box]:
    """Overlapping crops of `share` of each side, `per_side` in a row, row by row.

    >>> crop_boxes(300, 90)[:2], len(crop_boxes(300, 90))
    ([(0, 0, 100, 30), (50, 0, 150, 30)], 25)
    """

    def spans(length: int) -> list[tuple[int, int]]:
        part = max(1, round(length * share))
        starts = [round(place * (length - part) / (per_side - 1)) for place in range(per_side)]
        return [(start, start + part) for start in starts]

    return [(left, top, right, bottom) for top, bottom in spans(height) for left, right in spans(width)]


def region_map(score: float, boxes: Sequence[Box], scores: ArrayLike, size: tuple[int, int]) -> RegionMap:
    """The map of a picture of `size` (width, height) from the scores of its crops, which must cover it."""
    total, count = np.zeros((CELLS, CELLS)), np.zeros((CELLS, CELLS))
    across, down = (length * (np.arange(CELLS) + 0.5) / CELLS for length in size)
    for (left, top, right, bottom), value in zip(boxes, np.asarray(scores, np.float64), strict=True):
        covered = np.ix_((down >= top) & (down < bottom), (across >= left) & (across < right))
        total[covered] += value
        count[covered] += 1
    return RegionMap(score, (total / count).astype(np.float32))


def _with_bar(picture: Image.Image, best: float, veiled: float, score: float) -> Image.Image:
    """What no veil and a full one stand for, below a picture."""
    height, width = 34, 110
    page = Image.new("RGB", (max(picture.width, 260), picture.height + height), "white")
    page.paste(picture, (0, 0))
    opacity = Image.fromarray(np.tile(np.linspace(0, 255 * OPACITY, width), (12, 1)).astype(np.uint8))
    grey = Image.new("RGB", opacity.size, (200, 200, 200))
    page.paste(Image.composite(Image.new("RGB", grey.size, VEIL), grey, opacity), (46, picture.height + 12))
    draw = ImageDraw.Draw(page)
    draw.text((8, picture.height + 12), f"{best:.2f}", "black")
    draw.text((164, picture.height + 12), f"{max(veiled, 0):.2f}   whole picture {score:.2f}", "black")
    return page
