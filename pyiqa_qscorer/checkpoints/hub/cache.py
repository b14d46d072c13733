"""The cache on disk: where huggingface_hub files a download, and our notes of what belongs to it."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ...files import write_text
from .files import DownloadPlan, HubFile

logger = logging.getLogger("pyiqa_qscorer")

LIBRARY = "pyiqa-qscorer"  # our name in requests, and of the folder with our notes


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The cache that is meant: `cache_dir`, or else the one of `HF_HUB_CACHE` or `HF_HOME`."""
    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()


def blob_path(store: Path, file: HubFile) -> Path:
    """Where the content of `file` lies in the cache: under its hash."""
    return store / "blobs" / (file.digest or "hash-not-listed")


def partial_path(blob: Path) -> Path:
    """Where the content lies that has arrived so far."""
    return blob.with_name(f"{blob.name}.incomplete")


def size_of(path: Path) -> int:
    """Bytes in the file `path`; 0 if there is none."""
    # Asked once, not "exists, then size": another process may move the file in between.
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def has_size(path: Path, size: int | None) -> bool:
    """Whether `path` is a file of `size` bytes, or of any size if that is None."""
    return path.is_file() and size in (None, size_of(path))


def record(planned: DownloadPlan) -> None:
    """Note the commit's files in the cache, so that a run without network knows what is missing."""
    note = planned.store / LIBRARY / f"{planned.commit}.json"
    if planned.repo_files and (planned.missing or not note.exists()):
        sizes = {file.name: file.size for file in planned.repo_files}
        write_text(note, json.dumps({"revision": planned.revision, "files": sizes}, indent=1))


def record_revision(planned: DownloadPlan) -> None:
    """Let the branch or tag point to the commit, now that it is complete."""
    ref = planned.store / "refs" / planned.revision
    is_known = ref.is_file() and ref.read_text() == planned.commit
    if planned.repo_files and planned.revision != planned.commit and not is_known:
        write_text(ref, planned.commit)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the cache; empty if it cannot be read, which then counts as not there."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        logger.debug("%s cannot be read: %s", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
