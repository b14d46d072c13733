"""Which map finds local damage: crops' scores, gradient x input, or what smoothing a region does to the score.

    python benchmarks/biq2021.py BIQ2021 runs/biq2021
    python benchmarks/explain.py runs/biq2021 [--photos 200]

The photos of BIQ2021's validation part with the best opinions; one quarter of each is blurred, coded as a bad JPEG or
made noisy. A map points there if the quarter's mean is the worst of the four (chance: 25 %). The first half of the
photos is for choosing a method, the second for reporting it.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from source_commit import source_commit

from pyiqa_qscorer import Scorer
from pyiqa_qscorer.images.region_map import CELLS, crop_boxes, region_map

RESULTS = Path(__file__).resolve().parent / "results"
QUARTERS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # row, column


def blurred(part: Image.Image, _: np.random.Generator) -> Image.Image:
    return part.filter(ImageFilter.GaussianBlur(2))


def blocky(part: Image.Image, _: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    part.save(buffer, "JPEG", quality=8)
    return Image.open(buffer).convert("RGB")


def noisy(part: Image.Image, rng: np.random.Generator) -> Image.Image:
    values = np.asarray(part, np.float64) + rng.normal(0, 20, (*part.size[::-1], 3))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


DAMAGE: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "blur": blurred,
    "blocks": blocky,
    "noise": noisy,
}


def crops_map(scorer: Scorer, picture: Image.Image) -> np.ndarray:
    boxes = crop_boxes(*picture.size)
    return region_map(0.0, boxes, scorer.score([picture.crop(box) for box in boxes]), picture.size).values


def large_crops_map(scorer: Scorer, picture: Image.Image) -> np.ndarray:
    boxes = crop_boxes(*picture.size, per_side=3, share=1 / 2)
    return region_map(0.0, boxes, scorer.score([picture.crop(box) for box in boxes]), picture.size).values


def gradient_map(scorer: Scorer, picture: Image.Image) -> np.ndarray:
    """Sum of gradient x (input - its mean colour): what every region adds to the score."""
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    image.requires_grad_()
    scorer.metric(image).sum().backward()
    added = (image.grad * (image.detach() - image.detach().mean(dim=(2, 3), keepdim=True))).sum(dim=1, keepdim=True)
    return torch.nn.functional.adaptive_avg_pool2d(added, CELLS)[0, 0].numpy()


def smoothing_map(scorer: Scorer, picture: Image.Image) -> np.ndarray:
    """Loss of score where a sixteenth is smoothed: little where there is no detail left to lose, or only noise."""
    soft = picture.filter(ImageFilter.GaussianBlur(3))
    width, height = picture.size
    tried = []
    for row in range(4):
        for column in range(4):
            box = (column * width // 4, row * height // 4, (column + 1) * width // 4, (row + 1) * height // 4)
            changed = picture.copy()
            changed.paste(soft.crop(box), box)
            tried.append(changed)
    scores = scorer.score([picture, *tried])
    return np.kron((scores[0] - scores[1:]).reshape(4, 4), np.ones((CELLS // 4, CELLS // 4)))


METHODS = {
    "scores of 25 crops": crops_map,
    "scores of 9 large crops": large_crops_map,
    "gradient x input": gradient_map,
    "smoothing": smoothing_map,
}


def quarter_of(values: np.ndarray) -> tuple[int, int]:
    half = CELLS // 2
    means = {(r, c): values[r * half : (r + 1) * half, c * half : (c + 1) * half].mean() for r, c in QUARTERS}
    return min(means, key=means.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", type=Path)
    parser.add_argument("--photos", type=int, default=200)
    options = parser.parse_args()
    with (options.tables / "validation.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["mos"]))[: options.photos]
    random.Random(0).shuffle(rows)
    scorer, rng = Scorer("qscorer-mini", batch_size=8), np.random.default_rng(0)
    found: list[dict[str, object]] = []
    seconds = dict.fromkeys(METHODS, 0.0)
    for index, row in enumerate(rows):
        picture = Image.open(options.tables / "validation" / row["file"]).convert("RGB")
        kind, where = list(DAMAGE)[index % 3], QUARTERS[int(rng.integers(4))]
        left, top = where[1] * picture.width // 2, where[0] * picture.height // 2
        box = (left, top, left + picture.width // 2, top + picture.height // 2)
        damaged = picture.copy()
        damaged.paste(DAMAGE[kind](picture.crop(box), rng), box)
        result: dict[str, object] = {"damage": kind, "for": "choice" if index < len(rows) // 2 else "report"}
        for name, method in METHODS.items():
            started = time.monotonic()
            result[name] = quarter_of(method(scorer, damaged)) == where
            seconds[name] += time.monotonic() - started
        found.append(result)

    def rate(name: str, key: str, value: str) -> float:
        return float(np.mean([one[name] for one in found if one[key] == value]))

    rates = {
        name: {
            **{part: rate(name, "for", part) for part in ("choice", "report")},
            **{kind: rate(name, "damage", kind) for kind in DAMAGE},
            "seconds": round(seconds[name] / len(found), 2),
        }
        for name in METHODS
    }
    facts = {"commit": source_commit(), "photos": len(found), "chance": 0.25, "points at the damaged quarter": rates}
    (RESULTS / "explain.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
