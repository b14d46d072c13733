"""Scored images as one HTML page: histogram, thumbnails from worst to best, filters, failures."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from ..files import readable_size
from ..images.thumbnails import address_from, thumbnail
from ..registry import SCORE_RANGE
from ..report import printable, render_template, write_output
from .score_rows import ScoreRow

THUMBNAIL_SIDE = 144
BINS = 50


def write_score_page(path: Path, rows: Sequence[ScoreRow], thumbnails: bool = True) -> None:
    """Write a page that needs nothing from elsewhere, of rows in any order; an existing file is replaced.

    Args:
        thumbnails: put small copies of the images into the page, which lead to them: about 4 kB an image, 0.2 without.
            Leave them out where the images must not be passed on.

    Raises:
        OutputError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> page = Path(tempfile.mkdtemp()) / "page.html"
        >>> write_score_page(page, [ScoreRow("a.jpg", 3.5, width=640, height=480)], thumbnails=False)
        >>> "640 x 480" in page.read_text()
        True
    """
    scored = sorted((row for row in rows if row.score is not None), key=lambda row: row.score or 0.0)
    small: Sequence[str | None] = [None] * len(scored)
    if thumbnails:
        with ThreadPoolExecutor() as pool:
            small = list(pool.map(partial(thumbnail, side=THUMBNAIL_SIDE), [row.path for row in scored]))
    images = [
        {
            "path": printable(row.path),
            "link": address_from(path.parent, row.path),
            "score": row.score,
            "size": f"{row.width} x {row.height}" + (f", {readable_size(row.bytes)}" if row.bytes is not None else ""),
            "uri": uri,
        }
        for row, uri in zip(scored, small, strict=True)
    ]
    scores = np.array([row.score for row in scored], dtype=float)
    counts, edges = np.histogram(scores.clip(*SCORE_RANGE), bins=BINS, range=SCORE_RANGE)
    quantiles = np.percentile(scores, (10, 50, 90)) if len(scores) else None
    highest = max(counts.max(), 1)
    page = render_template(
        "scores.html.j2",
        title=f"Quality of {len(scored):,} images",
        metric=next((row.metric for row in rows if row.metric), None),
        quantiles=quantiles,
        bars=[(edge, count, count / highest) for edge, count in zip(edges[:-1], counts.tolist(), strict=True)],
        step=(SCORE_RANGE[1] - SCORE_RANGE[0]) / BINS,
        images=images,
        failures=[(printable(row.path), row.error) for row in rows if row.score is None],
    )
    write_output(path, page)
