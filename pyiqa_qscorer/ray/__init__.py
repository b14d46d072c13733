"""Scoring on Ray Data: streaming, on many machines, resumable (extra `ray`)."""

from __future__ import annotations

from .ray_scoring import read_images, score_dataset, score_to_folder

__all__ = ["read_images", "score_dataset", "score_to_folder"]
