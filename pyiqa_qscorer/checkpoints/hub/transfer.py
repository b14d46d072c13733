"""The download of what plans miss: room for it, its files one by one, resumed and verified."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import are_symlinks_supported, http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from ...errors import DownloadError
from ...files import readable_size
from .cache import LIBRARY, blob_path, free_bytes, has_size, partial_path, record, record_revision, size_of
from .failures import (
    ATTEMPTS,
    FETCH_ERRORS,
    damaged,
    explain,
    may_pass,
    reason_of,
    sizes_by_repository,
)
from .files import DownloadPlan, HubFile

logger = logging.getLogger("pyiqa_qscorer")

LARGE_DOWNLOAD = 10**9  # from here on the notice is a warning, which Python shows by default
PROGRESS = 2**20  # bytes that count as progress
DISK_MARGIN = 2**30  # left free beside the download, or 5 % of it where that is less


def download(plans: Sequence[DownloadPlan]) -> list[Path]:
    """Fetch what the plans miss; returns their folders, in order.

    The disk is checked for the sum before the first byte. Files are fetched one after the other,
    resumed when the connection drops or an earlier run was stopped, and checked against the size
    and hash that the Hub lists. Raises `DownloadError`; what was fetched until then is kept, and
    the next call continues there.
    """
    check_disk(plans)
    _announce(plans)
    for planned in plans:
        try:
            record(planned)
            for number, file in enumerate(planned.missing, start=1):
                _fetch_file(planned, file, f"[{number}/{len(planned.missing)}] {file.name}")
            record_revision(planned)
        except OSError as error:  # of the cache folder; those of a file are explained there
            if not planned.missing:  # complete, in a cache that must not be written: fine
                logger.debug("could not note %s in the cache: %s", planned.repo_id, error)
                continue
            where = planned.cache_dir
            raise explain(error, planned.repo_id, planned.revision, where) from error
    return [planned.folder for planned in plans]


def check_disk(plans: Sequence[DownloadPlan]) -> None:
    """Raise `DownloadError` unless the disks of the caches have room for all plans together."""
    for cache in dict.fromkeys(planned.cache_dir for planned in plans):
        here = [planned for planned in plans if planned.cache_dir == cache]
        needed = sum(planned.missing_bytes for planned in here)
        margin = min(DISK_MARGIN, needed // 20)
        free = free_bytes(cache)
        if needed and needed + margin > free:
            raise DownloadError(
                f"Too little disk space: {readable_size(needed)} are to be downloaded"
                f" ({sizes_by_repository(here)}), plus {readable_size(margin)} of reserve, but "
                f"{cache} has {readable_size(free)} free. Nothing was downloaded. Free some space, "
                "set HF_HOME (or `cache_dir`) to a bigger disk, or give `checkpoint` (and `base`) "
                "as folders that you already have."
            )


def _announce(plans: Sequence[DownloadPlan]) -> None:
    missing = [planned for planned in plans if planned.missing_bytes]
    size = sum(planned.missing_bytes for planned in missing)
    if not missing:
        return
    logger.log(
        logging.WARNING if size >= LARGE_DOWNLOAD else logging.INFO,
        "Downloading %s (%s) to %s, %s free. This is done once; if interrupted, it resumes.",
        readable_size(size),
        sizes_by_repository(missing),
        missing[0].cache_dir,
        readable_size(free_bytes(missing[0].cache_dir)),
    )


def _fetch_file(planned: DownloadPlan, file: HubFile, label: str) -> None:
    """One file into the cache; a bounded number of attempts, each continuing the one before."""
    blob = blob_path(planned.store, file)
    best, failures = size_of(partial_path(blob)), 0
    while True:
        try:
            return _fetch_file_once(planned, file, label)
        except FETCH_ERRORS as error:
            done = size_of(partial_path(blob))
            failures = 1 if done >= best + PROGRESS else failures + 1
            best = max(best, done)
            if failures >= ATTEMPTS or not may_pass(error):
                where = planned.cache_dir
                raise explain(error, planned.repo_id, planned.revision, where, file, done) from error
            logger.warning(
                "Fetching %s was interrupted after %s of %s (%s); continuing there.",
                file.name,
                readable_size(done),
                readable_size(file.size or 0),
                reason_of(error),
            )
            time.sleep(2 ** (failures - 1))


def _fetch_file_once(planned: DownloadPlan, file: HubFile, label: str) -> None:
    blob, pointer = blob_path(planned.store, file), planned.folder / file.name
    url = hf_hub_url(planned.repo_id, file.name, revision=planned.commit)
    served = get_hf_file_metadata(url).etag
    if pointer.exists() and not has_size(pointer, file.size):
        pointer.unlink()
    if file.digest is not None and served == file.digest:
        # hf_hub_download takes the same lock, so it must be free again when that is called.
        lock = planned.cache_dir / ".locks" / planned.store.name / f"{served}.lock"
        for folder in (lock.parent, blob.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not has_size(blob, file.size):
                blob.unlink(missing_ok=True)
                _fetch_blob(url, blob, file, label, planned.repo_id)
        if not are_symlinks_supported(planned.cache_dir):  # else there would be two copies
            pointer.parent.mkdir(parents=True, exist_ok=True)
            os.replace(blob, pointer)
    else:
        # This server does not file by hash, as the Hub does: only the size can be checked.
        logger.info("%s: this server gives no hash of %s", planned.repo_id, file.name)
    hf_hub_download(
        planned.repo_id,
        file.name,
        revision=planned.commit,
        cache_dir=planned.cache_dir,
        library_name=LIBRARY,
    )
    if not has_size(pointer, file.size):
        found = size_of(pointer)
        pointer.resolve().unlink(missing_ok=True)
        pointer.unlink(missing_ok=True)
        raise damaged(planned.repo_id, file, f"its size is {found} bytes, not {file.size}")


def _fetch_blob(url: str, blob: Path, file: HubFile, label: str, repo_id: str) -> None:
    """Download into `<blob>.incomplete`, continuing what is there; verify; move to `blob`."""
    partial = partial_path(blob)
    # Ranges of a compressed answer would not fit to the bytes on disk.
    headers = {**build_hf_headers(library_name=LIBRARY), "Accept-Encoding": "identity"}
    for found in (size_of(partial), 0):
        if file.size is not None and found > file.size:
            partial.unlink()
            continue
        with partial.open("ab") as stream:
            http_get(
                url,
                stream,
                resume_size=found,
                headers=headers,
                expected_size=file.size,
                displayed_filename=label,
            )
        if _digest(partial, file) == file.digest:
            os.replace(partial, blob)
            return
        partial.unlink()
        if found == 0:
            break
        # The part found here may have been damaged or written by another program: once more, whole.
        logger.warning("%s: the partial file was damaged; starting it again.", file.name)
    raise damaged(repo_id, file, "its content does not match its hash")


def _digest(path: Path, file: HubFile) -> str:
    """Hash of `path` of the same kind as `file.digest`: SHA-256, or git's SHA-1 of a blob."""
    is_sha256 = file.digest is not None and len(file.digest) == 64
    digest = hashlib.sha256() if is_sha256 else hashlib.sha1(b"blob %d\0" % size_of(path))
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()
