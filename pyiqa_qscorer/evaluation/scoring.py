"""Scores of a dataset's images by one metric: read ahead in threads, batched by shape, one failure at a time."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from ..data.opinions import OpinionRow, Transform
from ..data.score_files import ScoreRow, file_stamp
from ..errors import ImageError, QScorerError
from ..host.metric_protocol import BenchmarkMetric
from ..images.reading import open_image

logger = logging.getLogger("pyiqa_qscorer")

REFERENCES_KEPT = 8
BATCHES_HELD = 4
# Kernels for other batch sizes round differently; a metric that mixes the images of a batch is off by far more.
BATCH_TOLERANCE = 0.05


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


@dataclass
class _Read:
    """An image on its way to the metric: inputs, or the reason in `row.error`."""

    row: BenchmarkRow
    image: Tensor | None = None
    reference: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.image is not None
        return tuple(self.image.shape)


def score_rows(
    metric: BenchmarkMetric,
    opinions: Sequence[OpinionRow],
    label: str,
    identity: str,
    *,
    with_reference: bool,
    transform: Transform | None = None,
    batch_size: int = 1,
    workers: int = 1,
) -> Iterator[BenchmarkRow]:
    """One row per image, not in order: images of one shape are scored together.

    An image that cannot be read, or that the metric fails on, is a row with `error` and stops nothing. In a batch that
    fails, every image is tried alone. With `batch_size` above 1 the first batch is also scored image by image; a metric
    whose scores depend on the neighbours in the batch then goes on image by image, with a warning.

    Args:
        label, identity: for the rows.
        with_reference: whether the metric uses the references.
        transform: the dataset's own change of the pictures.
        workers: threads that read.
    """
    load = _Loader(metric, label, identity, with_reference, transform)
    batches = _Batches(metric, batch_size)
    with ThreadPoolExecutor(workers, thread_name_prefix="benchmark-read") as pool:
        waiting: deque[Future[_Read]] = deque()
        rest = iter(opinions)
        try:
            while True:
                waiting.extend(pool.submit(load, row) for row in islice(rest, 2 * batch_size + workers - len(waiting)))
                if not waiting:
                    break
                read = waiting.popleft().result()
                if read.image is None:
                    yield read.row
                else:
                    yield from batches.add(read)
            yield from batches.finish()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Loader:
    """Reads one image, and its reference, into inputs of the metric."""

    def __init__(
        self, metric: BenchmarkMetric, label: str, identity: str, with_reference: bool, transform: Transform | None
    ) -> None:
        self.metric, self.label, self.identity = metric, label, identity
        self.with_reference, self.transform = with_reference, transform
        # Distorted versions of one photo stand together in most datasets.
        self._reference = lru_cache(REFERENCES_KEPT)(open_image)

    def __call__(self, opinion: OpinionRow) -> _Read:
        # Stamped before it is read, so that resume sees a change that comes in between.
        size, modified = file_stamp(opinion.path)
        row = BenchmarkRow(
            opinion.path,
            metric=self.label,
            identity=self.identity,
            bytes=size,
            modified=modified,
            mos=opinion.mos,
        )
        reference = opinion.reference if self.with_reference else None
        if reference is not None:
            stamp = file_stamp(reference)
            row = replace(row, reference=reference, reference_bytes=stamp[0], reference_modified=stamp[1])
        try:
            pictures = [open_image(opinion.path)]
            row = replace(row, width=pictures[0].width, height=pictures[0].height)
            if reference is not None:
                pictures.append(self._reference(reference))
                check_reference(*pictures)
            if self.transform is not None:
                pictures = self.transform(pictures)
            inputs = [self.metric.prepare(picture) for picture in pictures]
        except ImageError as error:
            return _Read(replace(row, error=one_line(error).removeprefix(f"image {opinion.path!r}: ")))
        except MemoryError:
            return _Read(replace(row, error="not enough memory to decode this image"))
        return _Read(row, inputs[0], inputs[1] if reference is not None else None)


def check_reference(picture: Image.Image, reference: Image.Image) -> None:
    """Raise `ImageError` unless both are of one size."""
    if picture.size != reference.size:
        raise ImageError(
            f"the image is {picture.width}x{picture.height}, its reference "
            f"{reference.width}x{reference.height}: a full-reference metric needs one size"
        )


class _Batches:
    """Collects inputs by shape and scores each batch as it fills."""

    def __init__(self, metric: BenchmarkMetric, batch_size: int) -> None:
        self.metric, self.batch_size = metric, batch_size
        self._by_shape: dict[tuple[int, ...], list[_Read]] = {}
        self._checked = batch_size == 1

    def add(self, read: _Read) -> Iterator[BenchmarkRow]:
        batch = self._by_shape.setdefault(read.shape, [])
        batch.append(read)
        if len(batch) >= self.batch_size:
            yield from self._score(self._by_shape.pop(read.shape))
        elif sum(map(len, self._by_shape.values())) > BATCHES_HELD * self.batch_size:
            largest = max(self._by_shape, key=lambda shape: len(self._by_shape[shape]))
            yield from self._score(self._by_shape.pop(largest))

    def finish(self) -> Iterator[BenchmarkRow]:
        while self._by_shape:
            _, batch = self._by_shape.popitem()
            yield from self._score(batch)

    def _score(self, batch: list[_Read]) -> Iterator[BenchmarkRow]:
        if self.batch_size == 1 or len(batch) == 1:
            for read in batch:
                yield self._alone(read)
            return
        started = time.perf_counter()
        try:
            scores = self.metric.score(*_stacked(batch))
            if len(scores) != len(batch):
                raise QScorerError(f"{len(scores)} scores for {len(batch)} images")
        except Exception as error:  # metrics are foreign code and raise anything; each image then shows its own error
            logger.info("a batch of %d failed (%s): its images are scored alone", len(batch), one_line(error))
            for read in batch:
                yield self._alone(read)
            return
        seconds = (time.perf_counter() - started) / len(batch)
        rows = [_scored(read.row, score, seconds) for read, score in zip(batch, scores, strict=True)]
        if not self._checked:
            self._checked = True
            alone = [self._alone(read) for read in batch]
            if not _alike(rows, alone):
                logger.warning("%s", batch_warning(batch[0].row.metric or "the metric", rows, alone))
                self.batch_size = 1
                rows = alone
        yield from rows

    def _alone(self, read: _Read) -> BenchmarkRow:
        started = time.perf_counter()
        try:
            scores = self.metric.score(*_stacked([read]))
            if len(scores) != 1:
                raise QScorerError(f"{len(scores)} scores for one image")
        except Exception as error:  # as above: reported beside the image, and the others go on
            return replace(read.row, error=one_line(error))
        return _scored(read.row, scores[0], time.perf_counter() - started)


def _stacked(batch: Sequence[_Read]) -> tuple[Tensor, Tensor | None]:
    def stack(inputs: Sequence[Tensor | None]) -> Tensor | None:
        given = [tensor for tensor in inputs if tensor is not None]
        return torch.stack(given) if given else None

    images = stack([read.image for read in batch])
    assert images is not None
    return images, stack([read.reference for read in batch])


def _scored(row: BenchmarkRow, score: float, seconds: float) -> BenchmarkRow:
    if not math.isfinite(score):
        return replace(row, error=f"its score is {score}")
    return replace(row, score=score, seconds=round(seconds, 6))


def _alike(batched: Sequence[BenchmarkRow], alone: Sequence[BenchmarkRow]) -> bool:
    return not any(_differ(first.score, second.score) for first, second in zip(batched, alone, strict=True))


def _differ(batched: float | None, alone: float | None) -> bool:
    if batched is None or alone is None:
        return batched is not alone
    return abs(batched - alone) > BATCH_TOLERANCE * max(abs(alone), 1e-3)


def batch_warning(label: str, batched: Sequence[BenchmarkRow], alone: Sequence[BenchmarkRow]) -> str:
    """What to tell where scores depend on the batch."""
    first, second = next((a, b) for a, b in zip(batched, alone, strict=True) if _differ(a.score, b.score))
    return (
        f"{label}: {first.path} scores {first.score} in a batch of {len(batched)} but {second.score} alone; "
        "its images are scored one at a time"
    )


def one_line(error: BaseException) -> str:
    """The message of an error in one line, with its type where it is not ours."""
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, QScorerError) else f"{type(error).__name__}: {text}" if text else type(error).__name__
    )
