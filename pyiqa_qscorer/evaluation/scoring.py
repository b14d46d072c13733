"""Scores of a dataset's images by one metric: read ahead in threads, one row per image, one failure at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice

from PIL import Image
from torch import Tensor

from ..data.opinions import OpinionRow, Transform
from ..data.score_rows import ScoreRow
from ..errors import ImageError, QScorerError
from ..files import file_stamp, ordered_prefetch
from ..host.pyiqa_metrics import PyiqaMetric
from ..images.reading import open_image

REFERENCES_KEPT = 8


@dataclass(frozen=True, slots=True)
class BenchmarkRow(ScoreRow):
    """One image of a dataset with a metric's score; what is not known is None.

    Attributes:
        score: As the metric gives it, also where lower is better.
        mos: Opinion on the dataset's own scale, also where lower is better.
        seconds: That the metric took for this image, or the image's share of its batch; without reading the file.
        reference: File of the reference, for metrics that use one.
        reference_bytes, reference_modified: As `bytes` and `modified`.
    """

    mos: float | None = None
    seconds: float | None = None
    reference: str | None = None
    reference_bytes: int | None = None
    reference_modified: str | None = None

    def is_current(self) -> bool:
        """Whether image and reference are still the files that were read."""
        # Not super(): a dataclass with slots is another class than the one this body belongs to.
        if not ScoreRow.is_current(self):
            return False
        return self.reference is None or (self.reference_bytes, self.reference_modified) == file_stamp(self.reference)


Inputs = tuple[BenchmarkRow, list[Tensor]]
"""An image on its way to the metric, and its inputs (C, H, W): the image, and its reference if the metric uses one.

Without inputs the row says in `error` why the image cannot be scored.
"""


@dataclass(frozen=True)
class InputReader:
    """Reads an image of a dataset, and its reference if the metric uses it, into `Inputs` of a metric.

    Attributes:
        label, identity: of the metric, for the rows.
        transform: the dataset's own change of the pictures.
    """

    metric: PyiqaMetric
    label: str
    identity: str
    with_reference: bool
    transform: Transform | None
    # Distorted versions of one photo stand together in most datasets.
    _open_reference: Callable[[str], Image.Image] = field(
        default_factory=lambda: lru_cache(REFERENCES_KEPT)(open_image)
    )

    def __call__(self, opinion: OpinionRow) -> Inputs:
        # Stamped before it is read, so that resume sees a change that comes in between.
        size, modified = file_stamp(opinion.path)
        row = BenchmarkRow(
            opinion.path, metric=self.label, identity=self.identity, bytes=size, modified=modified, mos=opinion.mos
        )
        reference = opinion.reference if self.with_reference else None
        if reference is not None:
            size, modified = file_stamp(reference)
            row = replace(row, reference=reference, reference_bytes=size, reference_modified=modified)
        try:
            pictures = [open_image(opinion.path)]
            row = replace(row, width=pictures[0].width, height=pictures[0].height)
            if reference is not None:
                pictures.append(self._open_reference(reference))
                own, other = (f"{picture.width}x{picture.height}" for picture in pictures)
                if own != other:
                    raise ImageError(
                        f"the image is {own}, its reference {other}: a full-reference metric needs one size"
                    )
            if self.transform is not None:
                pictures = self.transform(pictures)
            return row, [self.metric.prepare(picture) for picture in pictures]
        except ImageError as error:
            return replace(row, error=one_line(error).removeprefix(f"image {opinion.path!r}: ")), []
        except MemoryError:
            return replace(row, error="not enough memory to decode this image"), []


def score_rows(
    read: InputReader, opinions: Sequence[OpinionRow], *, batch_size: int = 1, workers: int = 1
) -> Iterator[BenchmarkRow]:
    """One row per image, in order within what was readable.

    An image that cannot be read, or that the metric fails on, is a row with `error` and stops nothing. In a batch that
    fails, every image is tried alone.

    Args:
        batch_size: images per pass of a metric that takes batches; others take one image at a time, as pyiqa does.
        workers: threads that read.
    """
    size = batch_size if read.metric.takes_batches else 1
    read_ahead = ordered_prefetch(read, opinions, workers, ahead=size + workers)
    while batch := list(islice(read_ahead, size)):
        yield from (row for row, inputs in batch if not inputs)
        if readable := [(row, inputs) for row, inputs in batch if inputs]:
            yield from _score(read.metric, readable)


def _score(metric: PyiqaMetric, batch: Sequence[Inputs]) -> Iterator[BenchmarkRow]:
    started = time.perf_counter()
    try:
        images, *references = zip(*(inputs for _, inputs in batch), strict=True)
        scores = metric.score(images, references[0] if references else ())
    except Exception as error:  # metrics are foreign code and raise anything; the reason stands beside the image
        if len(batch) == 1:
            yield replace(batch[0][0], error=one_line(error))
            return
        for one in batch:
            yield from _score(metric, [one])
        return
    seconds = (time.perf_counter() - started) / len(batch)
    for (row, _), score in zip(batch, scores, strict=True):
        if math.isfinite(score):
            yield replace(row, score=score, seconds=round(seconds, 6))
        else:
            yield replace(row, error=f"its score is {score}")


def one_line(error: BaseException) -> str:
    """The message of an error in one line, with its type where it is not ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, QScorerError) else ": ".join(filter(None, [type(error).__name__, text]))
