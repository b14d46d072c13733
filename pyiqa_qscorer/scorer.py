"""`Scorer`: images of any kind and size in, scores out.

Decoding and resizing run in threads ahead of the model (Pillow releases the GIL), and one more thread brings the next
batch to the device while the model works on this one, so that the device waits neither for files nor for copies. Images
are read lazily, results come in input order, and at most `3 * batch_size + workers` images are held at a time, however
long the input.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image

from .data.score_rows import ScoreRow
from .data.score_store import ScoreTable
from .errors import FailedImagesError, ImageError, QScorerError, UnknownOptionError
from .files import file_stamp, ordered_prefetch
from .images.inputs import ImageLike, ImagePreparation, is_single, reason
from .images.model_images import ModelImages, SquareImages, rounded_levels
from .images.region_map import RegionMap, crop_boxes, region_map
from .images.staging import Stager
from .registry import OPTIONS, default_metric, nearest, resolve_metric_options

if TYPE_CHECKING:
    from .metric import QScorer

MAX_DEFAULT_WORKERS = 16


@dataclass(frozen=True)
class ScoredImage:
    """Result of one image; exactly one of `score` and `error` is None.

    Attributes:
        index: Position in the input, from 0.
        source: The path as given, or a short description of an image in memory.
        score: Finite; higher is better.
        error: Why there is no score, in one line.
        width, height: Of the image as it came in, before padding and resizing; None if unreadable.

    Example:
        >>> ScoredImage(0, "a.jpg", score=3.5, width=640, height=480).error is None
        True
    """

    index: int
    source: str
    score: float | None = None
    error: str | None = None
    width: int | None = None
    height: int | None = None


class Scorer:
    """Scores images, mixed in kind and size.

    An image is a path (str or os.PathLike), the bytes of an image file, a PIL image, a float
    tensor (3 or 1, H, W) in [0, 1], or a uint8 array (H, W, 3), (H, W, 4), (H, W, 1) or (H, W) in
    the order RGB(A); OpenCV gives BGR. Alpha is dropped.

    Args:
        metric: A name of `pyiqa_qscorer.METRICS`; or a built `QScorer` (any module with
            `score_pixels`, `image_size` or `images`, and `identity`), which is set to eval mode. Default
            `qscorer-mini`; with `checkpoint` (and no metric) `qscorer`.
        device: Where the model runs; default CUDA where there is one, else CPU. A built metric stays where it is.
        batch_size: Images per pass of the model.
        workers: Threads that decode and resize; default one per core, at most 16.
        **options: Those of `QScorer` (checkpoint, base, dtype, prompt, ...); only with a name.

    Raises:
        QScorerError: Unknown name or option, a device that does not exist, a faulty checkpoint.

    Example:
        >>> scorer = Scorer("qscorer-mini", device="cpu", batch_size=4)
        >>> scores = scorer.score([torch.zeros(3, 60, 80), np.zeros((90, 70, 3), np.uint8)])
        >>> scores.shape, scores.dtype
        ((2,), dtype('float32'))
    """

    def __init__(
        self,
        metric: str | torch.nn.Module | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 16,
        workers: int | None = None,
        **options: Any,
    ) -> None:
        self.batch_size = _positive("batch_size", batch_size)
        if workers is None:  # sched_getaffinity, unlike cpu_count, respects container limits
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = min(MAX_DEFAULT_WORKERS, cores)
        self.workers = _positive("workers", workers)
        for name in options.keys() - OPTIONS.keys():
            known = nearest(name, ["device", "batch_size", "workers", *OPTIONS])
            raise UnknownOptionError(f"Scorer has no option {name!r}; {known}")
        if metric is None:
            metric = default_metric(options.get("checkpoint"))
        if isinstance(metric, str):
            self.name = metric
            self.device = resolve_device(device)
            built: torch.nn.Module = build_metric(metric, options, self.device)
        else:
            _check_built(metric, options)
            self.name = str(getattr(metric, "name", type(metric).__name__))
            tensors = chain(metric.parameters(), metric.buffers(), [torch.empty(0)])
            self.device = next(tensors).device if device is None else resolve_device(device)
            built = metric
        self.metric = cast("QScorer", built.to(self.device).eval())
        given: Any = self.metric
        self._images: ModelImages = given.images if hasattr(given, "images") else SquareImages(given.image_size)
        self._prepare = ImagePreparation(self._images)

    def __repr__(self) -> str:
        sizes = f"batch_size={self.batch_size}, workers={self.workers}"
        return f"Scorer({self.name!r}, device={str(self.device)!r}, {sizes})"

    @property
    def identity(self) -> str:
        """Fingerprint of the checkpoint and of the options that change scores, 16 hex digits."""
        return self.metric.identity[:16]

    def score(self, images: ImageLike | Iterable[ImageLike], on_error: str = "raise") -> np.ndarray:
        """Scores of one image or of an iterable of images: float32 (N,), in input order.

        Args:
            images: A str is a path. A tensor or array is one image, unless it has 4 axes.
            on_error: "raise", or "nan" to get NaN for images that cannot be scored.

        Raises:
            FailedImagesError: (an `ImageError`) After all images were tried: lists those that
                failed and carries the scores of the others.
        """
        if on_error not in ("raise", "nan"):
            raise ValueError(f"on_error must be 'raise' or 'nan', not {on_error!r}")
        many = cast("Iterable[ImageLike]", [images] if is_single(images) else images)
        results = list(self._run(iter(many), weights_stay=True))
        scores = np.array([np.nan if item.score is None else item.score for item in results], dtype=np.float32)
        failures = [item for item in results if item.error is not None]
        if failures and on_error == "raise":
            raise FailedImagesError(scores, failures)
        return scores

    def explain(self, image: ImageLike) -> RegionMap:
        """Where in one image the quality is low: the scores of 25 overlapping crops, each as a picture of its own.

        A crop is seen larger than it is in the whole picture, so the map also shows faults that the score of the whole
        hardly feels. `benchmarks/explain.py` compares it with three other ways on planted damage.

        Raises:
            ImageError: it cannot be scored, or its crops would be smaller than this model can judge.

        Example:
            >>> found = Scorer("qscorer-mini", device="cpu").explain(np.zeros((240, 320, 3), np.uint8))
            >>> found.values.shape, found.overlay(Image.new("RGB", (320, 240))).size
            ((12, 12), (320, 274))
        """
        score = float(self.score(image)[0])
        if isinstance(image, torch.Tensor):
            levels = rounded_levels(image.detach().double() * 255)
            picture = Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
        else:
            picture = self._prepare.picture(image)
        boxes = crop_boxes(*picture.size)
        left, top, right, bottom = boxes[0]
        smallest = self._images.smallest_side
        if min(right - left, bottom - top) < smallest:
            raise ImageError(
                f"an image must have at least {3 * smallest} pixels on each side to be explained by its crops, got "
                f"{picture.width} x {picture.height}"
            )
        return region_map(score, boxes, self.score([picture.crop(box) for box in boxes]), picture.size)

    def score_iter(self, images: Iterable[ImageLike]) -> Iterator[ScoredImage]:
        """One `ScoredImage` per image, in input order, batch by batch; reads `images` lazily.

        An image that cannot be scored is a result with `error` and stops nothing. Raises what the
        model raises; and what `images` raises, once the images before that are scored.
        """
        if is_single(images):
            raise TypeError(f"score_iter takes an iterable of images, not a {type(images).__name__}: put it in a list")
        return self._run(iter(images))

    def _run(self, images: Iterator[ImageLike], weights_stay: bool = False) -> Iterator[ScoredImage]:
        """As `score_iter`; the model reads the prompt once where the caller does not change weights in between."""
        input_error: Exception | None = None

        def taken() -> Iterator[ImageLike]:
            nonlocal input_error
            try:
                yield from images
            except Exception as error:  # of the caller's iterable; raised after the images before it
                input_error = error

        decoders = ThreadPoolExecutor(self.workers, thread_name_prefix="qscorer-decode")
        submitted = (decoders.submit(self._prepare, image) for image in taken())
        in_batches = iter(lambda: list(islice(submitted, self.batch_size)), [])
        # Beside the batch in work the next one, and as many as give every decoder an image.
        ahead = 2 + math.ceil(self.workers / self.batch_size)
        staged = ordered_prefetch(Stager(self.device, self._images).stage, in_batches, 1, ahead)
        index = 0
        shared: dict[str, Any] = {}
        try:
            if weights_stay and hasattr(self.metric, "read_prefix"):
                shared["prefix"] = self.metric.read_prefix()
            for batch in staged:
                sources = [image.source for image in batch.images if image.error is None]
                pixels = batch.wait()
                scores = iter([] if pixels is None else self._scores(pixels, sources, **shared))
                for item in batch.images:
                    found = item.error or next(scores)
                    # As the shortest decimal: 3.302386, not 3.30238604545593.
                    score, error = (None, found) if isinstance(found, str) else (float(str(np.float32(found))), None)
                    yield ScoredImage(index, item.source, score, error, item.width, item.height)
                    index += 1
            if input_error is not None:
                raise input_error
        except torch.cuda.OutOfMemoryError as full:
            advice = f"lower batch_size (now {self.batch_size})"
            if self.batch_size == 1:
                advice = "batch_size is 1 already: use a smaller dtype or another device"
            raise QScorerError(f"CUDA ran out of memory with a batch of {self.batch_size} images: {advice}") from full
        finally:
            staged.close()  # first: a batch on its way needs its images
            decoders.shutdown(wait=True, cancel_futures=True)

    def _scores(self, pixels: Any, sources: Sequence[str], **shared: Any) -> list[float | str]:
        """Score of every image, or why there is none."""
        try:
            with torch.no_grad():  # not inference_mode: what the metric caches may be needed by a loss later
                scores: list[float] = self.metric.score_pixels(pixels, **shared).tolist()
        except QScorerError as error:
            if len(sources) == 1:
                return [reason(error, sources[0])]
            # The metric refuses a batch with a score that is not finite. Its neighbours have one.
            return [self._scores(pixels[row : row + 1], [source], **shared)[0] for row, source in enumerate(sources)]
        return [score if math.isfinite(score) else f"the model's score is {score}" for score in scores]


def build_metric(name: str, options: dict[str, Any], device: torch.device) -> QScorer:
    """The `QScorer` of a metric name, with `options` over those of the name, loaded for `device`."""
    from .metric import QScorer

    return QScorer(**resolve_metric_options(name, options), device=device)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """`device`; for None CUDA where there is one, else CPU.

    Raises:
        QScorerError: It does not exist here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise QScorerError(f"device must be like 'cpu', 'cuda' or 'cuda:1', not {device!r}") from error
    if resolved.type == "cuda":  # not tried out: of several processes, each would take memory of the first GPU
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise QScorerError(f"device {str(resolved)!r} does not exist: torch sees {count} CUDA devices")
    elif resolved.type != "cpu":
        try:
            torch.zeros(1, device=resolved).cpu()
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).partition(". ")[0]
            raise QScorerError(
                f"device {str(resolved)!r} cannot be used here ({reason}): use 'cpu' or 'cuda'"
            ) from error
    return resolved


def _check_built(metric: object, options: dict[str, Any]) -> None:
    needed = ("score_pixels", "image_size" if not hasattr(metric, "images") else "images", "identity")
    missing = [name for name in needed if not hasattr(metric, name)]
    if missing:
        raise TypeError(
            f"metric must be a metric name or a built QScorer, but {type(metric).__name__} has no "
            f"{', '.join(missing)} (of a pyiqa metric give .net)"
        )
    if options:
        raise TypeError(
            f"{', '.join(sorted(options))}: options go with a metric name; this metric is built, "
            "give them to QScorer(...)"
        )


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value


def score_files(scorer: Scorer, paths: Iterable[str], table: ScoreTable | None = None) -> Iterator[ScoreRow]:
    """Score image files: yield one row per path, in order, each first added to `table` if given.

    The weights must not change before the last row.
    """
    rows: deque[ScoreRow] = deque()
    name, identity = scorer.name, scorer.identity

    def read() -> Iterator[str]:
        for path in paths:
            # Stamped before it is read, so that resume sees a change that comes in between.
            size, modified = file_stamp(path)
            rows.append(ScoreRow(path, metric=name, identity=identity, bytes=size, modified=modified))
            yield path

    for item in scorer._run(read(), weights_stay=True):
        row = replace(rows.popleft(), score=item.score, error=item.error, width=item.width, height=item.height)
        if table is not None:
            table.add(row)
        yield row
