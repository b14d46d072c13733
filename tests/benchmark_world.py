"""A small world for the leaderboard's tests: quick stand-ins for metrics, datasets on disk, and, run as a program, the
command line with those metrics.

Environment of the program: FAKE_SECONDS_PER_IMAGE slows the metrics down, FAKE_LOG is a file that gets a line per
scored image.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyiqa_qscorer.errors import QScorerError
from pyiqa_qscorer.host import pyiqa_metrics
from pyiqa_qscorer.host.pyiqa_metrics import MetricDescription, MetricFacts
from pyiqa_qscorer.registry import nearest

DESCRIPTIONS = {
    **{name: MetricDescription("NR", False) for name in ("brightness", "broken", "picky", "undefined", "constant")},
    "darkness": MetricDescription("NR", True),
    "distance": MetricDescription("FR", True),
}


class FakeMetrics:
    """Takes the place of pyiqa's metrics: means of pixels, and metrics that fail in every way there is.

    Attributes:
        batches: sizes of all batches scored.
        takes_batches: whether the metrics say that images may share a batch.
    """

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.takes_batches = True

    def install(self, patch: Callable[[object, str, object], None] = setattr) -> FakeMetrics:
        patch(pyiqa_metrics, "describe_metric", self.describe)
        patch(pyiqa_metrics, "PyiqaMetric", self.build)
        return self

    def describe(self, name: str) -> MetricDescription:
        if name not in DESCRIPTIONS:
            raise QScorerError(f"pyiqa has no metric {name!r}; {nearest(name, DESCRIPTIONS)}")
        return DESCRIPTIONS[name]

    def build(self, name: str, device: torch.device, options: dict[str, Any]) -> FakeMetric:
        if name == "broken":
            raise OSError("the weights are gone")
        return FakeMetric(name, options, self)


class FakeMetric:
    def __init__(self, name: str, options: dict[str, Any], among: FakeMetrics) -> None:
        self.name, self.batches, self.takes_batches = name, among.batches, among.takes_batches
        self.facts = MetricFacts(f"{name}-{options.get('version', 1)}", 0, 0, 0, {"fake": "1"})

    def prepare(self, picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)

    def score(self, pictures: Sequence[Tensor], references: Sequence[Tensor]) -> list[float]:
        images = torch.stack(list(pictures))
        self.batches.append(len(images))
        time.sleep(float(os.environ.get("FAKE_SECONDS_PER_IMAGE", "0")) * len(images))
        means = images.double().mean((1, 2, 3)).tolist()
        if "FAKE_LOG" in os.environ:
            with open(os.environ["FAKE_LOG"], "a") as file:
                file.writelines(f"{self.name} {mean!r}\n" for mean in means)
        if self.name == "distance":
            return (images - torch.stack(list(references))).double().abs().mean((1, 2, 3)).tolist()
        assert not references
        if self.name == "picky" and max(means) > 0.6:
            raise RuntimeError("too bright\nfor me")
        if self.name == "constant":
            return [3.0] * len(means)
        return [float("nan") if self.name == "undefined" and mean < 0.3 else mean for mean in means]


def picture(level: int, size: tuple[int, int] = (24, 20), seed: int = 0) -> Image.Image:
    """Noise around a gray level."""
    noise = np.random.default_rng([seed, level]).integers(-20, 21, (size[1], size[0], 3))
    return Image.fromarray(np.clip(noise + level, 0, 255).astype(np.uint8))


def write_dataset(
    folder: Path, levels: Sequence[int], *, sizes: Sequence[tuple[int, int]] = ((24, 20),), references: bool = False
) -> Path:
    """Images whose MOS grows with their brightness, not quite in order; returns the CSV file."""
    images = folder / "images"
    images.mkdir(parents=True)
    rows = []
    for index, level in enumerate(levels):
        size = sizes[index % len(sizes)]
        name = f"{index:04}.png"
        picture(level, size, seed=index).save(images / name)
        mos = level / 50 + (0.5 if index % 3 == 0 else 0)
        row = [name, mos, 0.5]
        if references:
            if not (images / f"ref_{size[0]}.png").exists():
                picture(250, size, seed=999).save(images / f"ref_{size[0]}.png")
            row.append(f"ref_{size[0]}.png")
        rows.append(row)
    table = folder / "opinions.csv"
    write_csv(table, [["file", "mos", "std", *(["reference"] if references else [])], *rows])
    return table


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    from pyiqa_qscorer.cli import app as cli

    FakeMetrics().install()
    torch.set_num_threads(1)
    cli.main()
