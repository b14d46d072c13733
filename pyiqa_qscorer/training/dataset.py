"""Labelled images for training and validation: pyiqa datasets by name, or a folder with a CSV file."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..data.opinions import MosScale, OpinionRow, read_opinions
from ..errors import ImageError, OpinionTableError, TrainingDataError
from ..host.pyiqa_datasets import pyiqa_dataset
from ..images.reading import open_image
from .dataset_config import FolderDataset, PyiqaDataset


@dataclass(frozen=True)
class LabelledImage:
    """One image: `mos` in [1, 5], higher is better; `std` on the same scale, None where the dataset has none."""

    path: str
    mos: float
    std: float | None
    dataset: str


@dataclass(frozen=True)
class LabelledImages:
    """A dataset read from disk: its images, the scale they were mapped from, its weight, what was left out and why."""

    name: str
    images: list[LabelledImage]
    scale: MosScale
    weight: float = 1.0
    skipped: tuple[tuple[str, str], ...] = ()
    crop: tuple[int, int] | None = None


def read_dataset(
    config: PyiqaDataset | FolderDataset, phase: str, on_error: str = "stop", needs_std: bool = False
) -> LabelledImages:
    """Read a dataset's table, map its opinions to [1, 5], and check every row.

    Args:
        phase: `train`, `val` or `test`, for datasets with splits.
        on_error: `stop` at the first unusable row, or `skip` it and report it in `skipped`. `skip` decodes every image
            once, so that a broken one is known before training.
        needs_std: a missing spread of opinions makes a row unusable.

    Raises:
        TrainingDataError: no such file or column; nothing usable; or, with `stop`, a row whose image is missing or
            whose MOS is missing or outside the stated range.
        QScorerError: no such dataset of pyiqa, or its folder or table is missing.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
    name, scale, rows = _named_rows(config, phase) if isinstance(config, PyiqaDataset) else _own_rows(config, phase)
    usable, skipped = [], []
    for path, mos, std, _ in rows:
        problem = _problem(path, mos, std, scale, needs_std)
        if problem is None:
            mapped_std = None if std is None else float(scale.map_std(std))
            usable.append(LabelledImage(path, float(scale.map_mos(mos)), mapped_std, name))
        elif on_error == "stop":
            raise TrainingDataError(
                f"dataset {name}: {path}: {problem}; mend it, set on_error: skip, or, for a wrong range, give mos_range"
            )
        else:
            skipped.append((path, problem))
    if on_error == "skip":
        usable, broken = _decodable(usable)
        skipped += broken
    if not usable:
        raise TrainingDataError(f"dataset {name} has no usable image for phase {phase!r} ({len(skipped)} skipped)")
    return LabelledImages(name, usable, scale, config.weight, tuple(skipped), config.crop)


def _problem(path: str, mos: float, std: float | None, scale: MosScale, needs_std: bool) -> str | None:
    if not Path(path).is_file():
        return "the image is missing"
    if not math.isfinite(mos):
        return "its MOS is missing"
    if not scale.contains(mos):
        return f"its MOS {mos} is outside the stated range [{scale.low}, {scale.high}]"
    if std is not None and not (math.isfinite(std) and std >= 0):
        return f"its standard deviation {std} is not a number >= 0"
    if needs_std and std is None:
        return "its standard deviation is missing, which the objective needs"
    return None


def _decodable(images: Sequence[LabelledImage]) -> tuple[list[LabelledImage], list[tuple[str, str]]]:
    def problem(image: LabelledImage) -> str | None:
        try:
            open_image(image.path)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(problem, images))
    good = [image for image, found in zip(images, problems, strict=True) if found is None]
    return good, [(image.path, found) for image, found in zip(images, problems, strict=True) if found is not None]


def _own_rows(config: FolderDataset, phase: str) -> tuple[str, MosScale, list[OpinionRow]]:
    try:
        rows = read_opinions(
            config.csv,
            config.folder or config.csv.parent,
            file_column=config.file_column,
            mos_column=config.mos_column,
            std_column=config.std_column,
            split_column=config.split_column,
            phase=phase,
        )
    except OpinionTableError as error:
        raise TrainingDataError(str(error)) from error
    return config.name or config.csv.stem, MosScale(*config.mos_range, config.lower_better, config.std_range), rows


def _named_rows(config: PyiqaDataset, phase: str) -> tuple[str, MosScale, list[OpinionRow]]:
    name = config.dataset
    options: dict[str, Any] = {"phase": phase} | ({} if config.split is None else {"split_index": config.split})
    rows, info = pyiqa_dataset(name, config.data_root, options, download=config.download)
    low, high = config.mos_range or info["mos_range"]
    lower_better = config.lower_better or bool(info.get("lower_better", False))
    std_range = config.std_range or ((1.0, 5.0) if name.startswith("koniq10k") else None)
    return config.name or name, MosScale(low, high, lower_better, std_range), rows


def drawn_number(*numbers: int) -> int:
    """A number in [0, 2^64) that is a function of the arguments alone, so that a resumed run draws it again."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big")


class QualityDataset(Dataset[dict[str, Any]]):
    """Labelled images as model inputs; what is random in them is a function of (seed, epoch, index) alone.

    Args:
        parts: datasets, mixed by their weights in `MixedSampler`.
        sample: what a model's `ModelImages.sample` makes of a picture.
        flip: mirror half of the images, another half each epoch. The only augmentation: others change quality.
        texts: question variants; one is drawn per image and epoch.
    """

    def __init__(
        self,
        parts: Sequence[LabelledImages],
        sample: Callable[[Image.Image], Tensor],
        texts: int = 1,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.parts = list(parts)
        self.images = [image for part in parts for image in part.images]
        self.part_of = [number for number, part in enumerate(parts) for _ in part.images]
        self.sample, self.texts, self.flip, self.seed = sample, texts, flip, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        """`pixel_values` (as `sample` makes them), `mos`, `std` (NaN where there is none), `dataset`, `text` (which).

        Args:
            item: index, or (index, epoch) as `MixedSampler` gives it; the epoch decides flip and question.
        """
        index, epoch = item if isinstance(item, tuple) else (item, 0)
        return {**self.facts(item), "pixel_values": self.pixels(index, epoch, self.flipped(index, epoch))}

    def pixels(self, index: int, epoch: int = 0, flipped: bool = False) -> Tensor:
        """Sample of an image as an epoch sees it, mirrored or not."""
        image = self.images[index]
        try:
            picture = open_image(image.path)
        except ImageError as error:
            raise TrainingDataError(
                f"dataset {image.dataset}: {error}; mend it, or set on_error: skip to leave broken images out"
            ) from error
        if crop := self.parts[self.part_of[index]].crop:
            picture = _random_square(picture, crop, drawn_number(self.seed, epoch, index, 1))
        if flipped:
            picture = ImageOps.mirror(picture)
        return self.sample(picture)

    def flipped(self, index: int, epoch: int) -> bool:
        """Whether an image is mirrored in an epoch."""
        return self.flip and drawn_number(self.seed, epoch, index) % 2 == 1

    def facts(self, item: int | tuple[int, int]) -> dict[str, Any]:
        """An item without its pixels."""
        index, epoch = item if isinstance(item, tuple) else (item, 0)
        image = self.images[index]
        return {
            "mos": image.mos,
            "std": math.nan if image.std is None else image.std,
            "dataset": self.part_of[index],
            "text": (drawn_number(self.seed, epoch, index) // 2) % self.texts,
        }


def _random_square(picture: Image.Image, sides: tuple[int, int], seed: int) -> Image.Image:
    """A square of a picture, its side drawn evenly in the logarithm and no longer than the picture's shorter one."""
    rng = np.random.default_rng(seed)
    side = min(round(math.exp(rng.uniform(*np.log(sides)))), *picture.size)
    left, top = (int(rng.integers(length - side + 1)) for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


def refuse_overlap(train: Sequence[LabelledImages], validation: Sequence[LabelledImages]) -> None:
    """Raise `TrainingDataError` where an image, by whatever path, is both trained and validated on."""
    seen = {os.path.realpath(image.path) for part in train for image in part.images}
    shared = [image.path for part in validation for image in part.images if os.path.realpath(image.path) in seen]
    if shared:
        raise TrainingDataError(
            f"{len(shared)} images are in both training and validation data, e.g. {shared[0]}: give the datasets a "
            "split, or set data.allow_overlap: true"
        )


def scale_facts(parts: Sequence[LabelledImages]) -> list[dict[str, Any]]:
    """What a checkpoint keeps of its training data: names, sizes, weights, scales."""
    return [
        {
            "dataset": part.name,
            "images": len(part.images),
            "weight": part.weight,
            "skipped": len(part.skipped),
            "mos_range": [part.scale.low, part.scale.high],
            "lower_better": part.scale.lower_better,
            "mapped_to": [1, 5],
        }
        for part in parts
    ]
