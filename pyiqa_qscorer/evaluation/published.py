"""Figures that others published, to stand beside ours: never run here, and marked so."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from ..registry import METRICS, PUBLISHED_CHECKPOINT
from .results import Entry

SOURCE = (
    "README of the published Q-Scorer code (Revisiting MLLM Based Image Quality Assessment: Errors and Remedy, "
    "AAAI 2026); all trained on KonIQ-10k"
)
PUBLISHED_MODEL = "Q-Scorer (5 tokens)"
"""What the checkpoint of `qscorer`, `qscorer_8bit` and `qscorer_4bit` is called there."""

TOLERANCE = 0.005
"""Largest difference that precision and rounding explain: the published figures have three decimals."""


@dataclass(frozen=True)
class PublishedResult:
    """SRCC and PLCC of a method on a dataset; both after the logistic fit, as the published script computes them.

    Attributes:
        setting: `in-domain`, or `cross`: no image of the dataset was trained on.
    """

    method: str
    dataset: str
    setting: str
    plcc: float
    srcc: float


@dataclass(frozen=True)
class PublishedDifference:
    """Our run of the published checkpoint beside the published figure.

    Attributes:
        here: None where the measure is not defined, or the metric could not run.
        images: That `here` stands on.
    """

    metric: str
    dataset: str
    measure: str
    published: float
    here: float | None
    images: int

    @property
    def difference(self) -> float | None:
        return None if self.here is None else self.here - self.published

    @property
    def agrees(self) -> bool:
        """Whether the difference is no more than `TOLERANCE`."""
        return self.difference is not None and abs(self.difference) <= TOLERANCE


def published_results() -> list[PublishedResult]:
    """All published figures (`SOURCE`)."""
    text = files("pyiqa_qscorer.evaluation").joinpath("published_results.csv").read_text(encoding="utf-8")
    return [
        PublishedResult(row["method"], row["dataset"], row["setting"], float(row["plcc"]), float(row["srcc"]))
        for row in csv.DictReader(text.splitlines())
    ]


def check_published(entries: Sequence[Entry]) -> list[PublishedDifference]:
    """What the published checkpoint's metrics give here beside what was published, where there is both.

    A metric counts by its name, wherever its files were read from.
    """
    figures = {result.dataset: result for result in published_results() if result.method == PUBLISHED_MODEL}
    found = []
    for entry in entries:
        definition, figure = METRICS.get(entry.facts["name"]), figures.get(entry.dataset)
        if definition and definition.options["checkpoint"] == PUBLISHED_CHECKPOINT and figure:
            of, images = (entry.metric, entry.dataset), len(entry.scored)
            found += [
                PublishedDifference(*of, "SRCC", figure.srcc, entry.agreement.srcc, images),
                PublishedDifference(*of, "PLCC", figure.plcc, entry.agreement.plcc_fitted, images),
            ]
    return found
