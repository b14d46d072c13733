"""Files: written whole or not at all, told apart, and their sizes in words."""

from __future__ import annotations

import os
import shutil
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, and rename that; an older file is replaced.

    Missing folders are made. Who may read the file is what the umask says. Several threads and processes may write the
    same file: one of them wins.

    Raises:
        OSError: it cannot be written; an older file then stays as it was, and no temporary one is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power failure could leave the new name with nothing in it
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """The same for text in UTF-8; `errors` as for `str.encode`. Line ends stay as they are."""
    write_bytes(path, text.encode("utf-8", errors))


def file_key(path: str) -> str:
    """Equal for all spellings of a path (`a.png`, `./a.png`, absolute); links are not resolved."""
    return os.path.normcase(os.path.abspath(path))


def file_stamp(path: str) -> tuple[int | None, str | None]:
    """Size in bytes and time of last change (ISO 8601, UTC); None, None for a file that cannot be looked at."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a path with a null character
        return None, None
    changed = EPOCH + timedelta(microseconds=status.st_mtime_ns // 1000)
    return status.st_size, changed.isoformat(timespec="microseconds")


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def readable_size(size: float) -> str:
    """`size` bytes in powers of ten, as disks and memory are sold: "16.4 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"
