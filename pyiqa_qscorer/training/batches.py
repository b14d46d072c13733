"""Order of the images in an epoch, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..data.labels import level_index
from .dataset import LabelledImages, drawn_number
from .text import TrainingText, pad_texts


class MixedSampler(Sampler[tuple[int, int]]):
    """Shuffled (index, epoch) of one epoch: each image of a dataset floor(weight) times, and a drawn share once more.

    Weight 1 is every image once, 2.5 every image twice and half of them a third time, 0.2 a fifth of them. A function
    of (seed, epoch), so a resumed run sees the same order and every process of a distributed run agrees.
    """

    def __init__(self, parts: Sequence[LabelledImages], seed: int = 0) -> None:
        self.sizes = [len(part.images) for part in parts]
        self.weights = [part.weight for part in parts]
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(round(size * weight) for size, weight in zip(self.sizes, self.weights, strict=True))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(drawn_number(self.seed, self.epoch) % 2**63)
        indices: list[int] = []
        start = 0
        for size, weight in zip(self.sizes, self.weights, strict=True):
            drawn = torch.randperm(size, generator=generator)[: round(size * weight) - int(weight) * size]
            indices += list(range(start, start + size)) * int(weight) + (drawn + start).tolist()
            start += size
        order = torch.randperm(len(indices), generator=generator)
        return iter([(indices[position], self.epoch) for position in order.tolist()])


@dataclass
class Collator:
    """Samples -> batch: pads texts (question variants) around the image, labels the quality token."""

    texts: Sequence[TrainingText]
    quality_ids: Sequence[int]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        opinions, levels = batched_opinions(samples, len(self.quality_ids))
        questions = [self.texts[sample["text"]] for sample in samples]
        answered = [text.with_quality(self.quality_ids[level]) for text, level in zip(questions, levels, strict=True)]
        pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
        return {**pad_texts(answered), "pixel_values": pixel_values, **opinions}


def batched_opinions(samples: Sequence[dict[str, Any]], levels: int) -> tuple[dict[str, Tensor], list[int]]:
    """`mos`, `mos_std`, `dataset` (B,), and the index of the equal interval of [1, 5] that each MOS falls into.

    Args:
        levels: K intervals; the index goes from 0 (worst) to K - 1.
    """
    mos = torch.tensor([sample["mos"] for sample in samples], dtype=torch.float32)
    opinions = {
        "mos": mos,
        "mos_std": torch.tensor([sample["std"] for sample in samples], dtype=torch.float32),
        "dataset": torch.tensor([sample["dataset"] for sample in samples]),
    }
    return opinions, level_index(mos.numpy(), levels).tolist()
