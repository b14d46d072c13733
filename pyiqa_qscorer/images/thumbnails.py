"""Small copies of image files inside a page, and the addresses of the files as seen from it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from ..report import data_uri


def thumbnail(path: str, side: int) -> str | None:
    """Data URI of `small_jpeg`."""
    encoded = small_jpeg(path, side)
    return None if encoded is None else data_uri(encoded, "jpeg")


def small_jpeg(path: str, side: int) -> bytes | None:
    """A JPEG of at most `side` pixels; None for a file that is no image any more."""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (side, side))  # large JPEGs are decoded at an eighth of their size
            small = picture.convert("RGB")
        small.thumbnail((side, side))
        small.save(buffer, "JPEG", quality=75)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return buffer.getvalue()


def address_from(folder: Path, path: str) -> str:
    """A file's address as seen from a folder, or absolute where no relative path leads there (another drive)."""
    try:
        return quote(os.path.relpath(path, folder).replace(os.sep, "/"))
    except ValueError:
        return Path(path).absolute().as_uri()
