"""Errors of the package. All derive from `QScorerError`, so one `except` catches what is ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

FAILURES_IN_MESSAGE = 20


class QScorerError(RuntimeError):
    """Base of every error that this package raises on purpose."""


class ImageError(QScorerError, ValueError):
    """An image cannot be read or holds values that cannot be scored."""


class CheckpointError(QScorerError):
    """A checkpoint is incomplete, malformed, or not of a known layout."""


class DownloadError(QScorerError):
    """A checkpoint could not be fetched from the Hub."""


class SyntheticDataError(QScorerError, ValueError):
    """Photos cannot be found, or a folder holds another rendering than the one asked for."""


class TrainingConfigError(QScorerError, ValueError):
    """A training configuration has an unknown key or a value outside its rule."""


class TrainingDataError(QScorerError, ValueError):
    """A dataset cannot be read, or holds something that must not be trained on."""


class TrainingFailedError(QScorerError):
    """Training could not go on; the message says what to change."""


class OpinionTableError(QScorerError, ValueError):
    """A table of opinions cannot be read, or does not fit what was said of it."""


class UnknownMetricError(QScorerError, KeyError):
    """No metric of this package has that name."""

    __str__ = RuntimeError.__str__  # KeyError would show the message in quotes


class UnknownOptionError(QScorerError, TypeError):
    """A metric was given an option that none of them has."""


class InputError(QScorerError, ValueError):
    """What was asked for cannot be started: nothing to score, a URL, an output in the way."""


class OutputError(QScorerError):
    """The table cannot be written: disk full, no permission."""


class FailedImagesError(ImageError):
    """Some images have no score; all others were scored before this was raised.

    Attributes:
        scores: float32 array (N,), NaN where an image failed.
        failures: The failed images, in input order, each a `ScoredImage`.
    """

    def __init__(self, scores: np.ndarray, failures: Sequence[Any]) -> None:
        self.scores = scores
        self.failures = list(failures)
        lines = [f"  [{item.index}] {item.source}: {item.error}" for item in self.failures]
        if len(lines) > FAILURES_IN_MESSAGE:
            hidden = len(lines) - FAILURES_IN_MESSAGE
            lines[FAILURES_IN_MESSAGE:] = [f"  and {hidden} more: see .failures of this error"]
        super().__init__(
            f"{len(self.failures)} of {len(scores)} images could not be scored. The scores of the "
            "others are in .scores of this error; on_error='nan' returns them instead.\n" + "\n".join(lines)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.scores, self.failures)
