"""Files: written whole or not at all, told apart, their sizes in words; and work ahead, results in order."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar

from .errors import CheckpointError

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
Item = TypeVar("Item")
Result = TypeVar("Result")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, and rename that; missing folders are made.

    Several threads and processes may write the same file: one of them wins. On an error an older file stays as it was.
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


def write_text(path: Path, text: str) -> None:
    """The same for text in UTF-8. Line ends stay as they are."""
    write_bytes(path, text.encode("utf-8"))


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


def ordered_prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | Executor, ahead: int
) -> Generator[Result, None, None]:
    """`map(function, items)` with several calls under way.

    Args:
        items: Any length, also endless; taken from one by one, in the thread that takes the results.
        workers: Number of threads (>= 1), or an executor, which stays open.
        ahead: Calls (>= 1) that are under way or finished and not yet taken, so memory is bounded.

    Yields:
        The results in order. What a call raises is raised in its place, and ends the loop.

    Raises:
        ValueError: `workers` or `ahead` is below 1.

    >>> list(ordered_prefetch(abs, [-3, 1, -2], workers=2, ahead=2))
    [3, 1, 2]
    """
    if ahead < 1 or (not isinstance(workers, Executor) and workers < 1):
        raise ValueError(f"workers and ahead must be >= 1, got {workers} and {ahead}")
    pool = workers if isinstance(workers, Executor) else ThreadPoolExecutor(workers, thread_name_prefix="qscorer-ahead")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also where the caller takes no more, or a call has failed
        for future in pending:
            future.cancel()
        if pool is not workers:
            pool.shutdown()


def read_json(path: Path) -> dict[str, Any]:
    """Parsed JSON object of a file; a missing or malformed one is a `CheckpointError` that names it."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(parsed).__name__}")
    return parsed


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as the published files have it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def listed(names: Iterable[str]) -> str:
    """The first eight, and how many more there are, for a message."""
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
