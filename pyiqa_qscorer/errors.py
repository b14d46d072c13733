"""Errors of the package. All derive from `QScorerError`, so one `except` catches what is ours."""

from __future__ import annotations


class QScorerError(RuntimeError):
    """Base of every error that this package raises on purpose."""


class ImageError(QScorerError, ValueError):
    """An image cannot be read or holds values that cannot be scored."""


class CheckpointError(QScorerError):
    """A checkpoint is incomplete, malformed, or not of a known layout."""


class DownloadError(QScorerError):
    """A checkpoint could not be fetched from the Hub."""
