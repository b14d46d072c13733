"""Checkpoints from the Hugging Face Hub: first a plan (files, sizes, what is missing), then the download.

`plan` moves no weights; `download` compares the sum of all plans with the free disk before the first byte. The files
end up in the usual Hub cache (`HF_HOME`, `HF_HUB_CACHE` or `cache_dir`), where every other tool finds them.
`HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_TOKEN` work as in all programs that use `huggingface_hub`, which moves the bytes
and shows the progress. This file adds checks of disk and hashes, further attempts, and messages that say what to do.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CheckpointError, DownloadError
from ..files import free_bytes, listed, readable_size, write_text
from .layouts import checkpoint_files

logger = logging.getLogger("pyiqa_qscorer")

LIBRARY = "pyiqa-qscorer"  # in requests
LARGE_DOWNLOAD = 10**9  # bytes, from here on announced
DISK_MARGIN = 2**30  # left free beside the download, or 5 % of it where that is less
PAUSES = (1, 2, 4)  # seconds before another attempt; counted anew whenever a file was completed
WORKERS = 2  # files at a time; those that are not complete when the process is killed start again
LISTING_TIMEOUT = 10  # seconds without an answer
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
# HTTPError is the transport's base class (httpx or httpx2, by version of huggingface_hub).
FETCH_ERRORS: tuple[type[Exception], ...] = (HTTPError, OSError, EntryNotFoundError)
# What answers may be no Hub: the page of a hotel's network, a mirror with an error in its JSON.
LISTING_ERRORS: tuple[type[Exception], ...] = (*FETCH_ERRORS, ValueError, LookupError, TypeError)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; `digest` is the SHA-256 of a large file, git's SHA-1 of another one."""

    name: str
    size: int | None  # None: not listed
    digest: str | None = None


@dataclass(frozen=True)
class DownloadPlan:
    """What a checkpoint needs from one repository at one commit, and what of it is not in the cache yet."""

    repo_id: str
    revision: str
    commit: str
    cache_dir: Path
    files: tuple[HubFile, ...]

    @property
    def store(self) -> Path:
        """Folder of the repository in the cache, with `blobs`, `snapshots` and `refs`."""
        return self.cache_dir / f"models--{self.repo_id.replace('/', '--')}"

    @property
    def folder(self) -> Path:
        """Folder with the files under their own names, once they are downloaded."""
        return self.store / "snapshots" / self.commit

    @property
    def missing(self) -> list[HubFile]:
        """Files that are not in the cache now, or not with the listed size."""
        return [file for file in self.files if not has_size(self.folder / file.name, file.size)]

    @property
    def missing_bytes(self) -> int:
        """What is to be transferred; an older commit may have left the content already, under its hash."""
        blobs = self.store / "blobs"
        to_fetch = (file for file in self.missing if not (file.digest and has_size(blobs / file.digest, file.size)))
        return sum(file.size or 0 for file in to_fetch)

    def absent(self) -> str:
        """What is missing, in words."""
        missing = self.missing
        return f"{len(missing)} of {len(self.files)} files are missing: {listed(file.name for file in missing)}"


def has_size(path: Path, size: int | None) -> bool:
    """Whether `path` is a file of `size` bytes, or of any size if that is None."""
    try:
        return path.stat().st_size == size or size is None
    except (FileNotFoundError, NotADirectoryError):
        return False


def plan(
    repo_id: str,
    revision: str | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> DownloadPlan:
    """What is needed of `repo_id` at `revision` (branch, tag, commit hash; default: main branch).

    A commit hash that is complete in the cache is answered without a request. Where the Hub cannot be asked
    (`local_files_only`, `HF_HUB_OFFLINE=1`, no connection, no access any more), a complete cached copy is used.

    Raises:
        DownloadError: neither the Hub nor the cache has it, it is closed, or there is no such repository or revision.
        CheckpointError: it holds no file of a checkpoint.
    """
    revision = revision or constants.DEFAULT_REVISION
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
    try:
        cached = _plan_from_cache(repo_id, revision, cache)
        complete = cached if cached is not None and not cached.missing else None
    except OSError as error:  # such as a cache folder of another user
        raise _explained(error, repo_id, revision, cache) from error
    if local_files_only or constants.HF_HUB_OFFLINE:
        if complete is not None:
            return complete
        why = "local_files_only is set" if local_files_only else "HF_HUB_OFFLINE=1 is set"
        state = f"(revision {revision!r}) is not in the cache {cache}"
        if cached is not None:
            state = f"is only partly in the cache {cache}: {cached.absent()}, an earlier download was interrupted"
        raise DownloadError(
            f"{repo_id!r} {state}, and nothing may be downloaded because {why}. Run once with network access (complete "
            "files are kept), set HF_HOME (or `cache_dir`) to a cache that holds it, or give a local folder."
        )
    if complete is not None and revision == complete.commit and all(file.size is not None for file in complete.files):
        return complete
    try:
        return _plan_from_hub(repo_id, revision, cache, () if complete else PAUSES)
    except LISTING_ERRORS as error:
        explained = _explained(error, repo_id, revision, cache)
        if complete is None or isinstance(error, RevisionNotFoundError):
            raise explained from error
        logger.warning("%s Using the cached copy, commit %s.", explained, complete.commit)
        return complete


def _plan_from_cache(repo_id: str, revision: str, cache: Path) -> DownloadPlan | None:
    """Plan by the list of files that an earlier download left, else by what lies there; None: nothing is there."""
    config = try_to_load_from_cache(repo_id, "config.json", cache_dir=cache, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        tree = get_cached_repo_tree(repo_id, revision=folder.name, cache_dir=cache)
        sizes: dict[str, int | None] = {entry.path: entry.size for entry in tree}
    except CachedRepoTreeNotFoundError:
        sizes = {path.name: None for path in folder.iterdir()}
    files = tuple(HubFile(name, sizes[name]) for name in checkpoint_files(list(sizes)))
    return DownloadPlan(repo_id, revision, folder.name, cache, files)


def _plan_from_hub(repo_id: str, revision: str, cache: Path, pauses: Sequence[int]) -> DownloadPlan:
    """Plan by the Hub's list of files. A closed repository is an error here already."""
    api = HfApi(library_name=LIBRARY)
    for pause in (*pauses, None):
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=LISTING_TIMEOUT)
            if info.gated:  # the list is public even then, the files are not
                api.auth_check(repo_id)
            break
        except FETCH_ERRORS as error:
            if pause is None or not _may_pass(error):
                raise
            time.sleep(pause)
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise ValueError(f"the listing names no commit (sha: {info.sha!r})")
    files = {
        entry.rfilename: HubFile(entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in info.siblings or ()
    }
    needed = tuple(files[name] for name in checkpoint_files(list(files)))
    if not needed:
        raise CheckpointError(
            f"{repo_id!r} at {revision!r} holds no file of a checkpoint; it has {listed(files)}. Expected config.json "
            "beside model or adapter weights."
        )
    return DownloadPlan(repo_id, revision, str(info.sha), cache, needed)


def download(plans: Sequence[DownloadPlan]) -> list[Path]:
    """Fetch what the plans, which share a cache, miss; returns their folders, in order.

    The disk is checked for the sum before the first byte. A file that is cut is fetched again, a bounded number of
    times; every fetched file is checked against the size and hash that the Hub lists.

    Raises:
        DownloadError: too little disk, or what the Hub or the connection did. Complete files are kept, and the next
            call goes on with the others.
    """
    if plans:
        _check_disk(plans[0].cache_dir, plans)
    for planned in plans:
        try:
            _fetch(planned)
            ref = planned.store / "refs" / planned.revision  # what the branch means for runs without network
            if planned.revision != planned.commit and not (ref.is_file() and ref.read_text() == planned.commit):
                write_text(ref, planned.commit)
        except OSError as error:
            if planned.missing:
                raise _explained(error, planned.repo_id, planned.revision, planned.cache_dir) from error
            logger.debug("could not note %s in the cache: %s", planned.repo_id, error)  # read-only, but complete
    return [planned.folder for planned in plans]


def _check_disk(cache: Path, plans: Sequence[DownloadPlan]) -> None:
    """Raise `DownloadError` unless the disk has room for all plans together; announce what is going to come."""
    sizes = {planned.repo_id: planned.missing_bytes for planned in plans}
    needed, free = sum(sizes.values()), free_bytes(cache)
    margin = min(DISK_MARGIN, needed // 20)
    parts = ", ".join(f"{repo_id}: {readable_size(size)}" for repo_id, size in sizes.items())
    if needed and needed + margin > free:
        raise DownloadError(
            f"Too little disk space: {readable_size(needed)} are to be downloaded ({parts}), plus "
            f"{readable_size(margin)} of reserve, but {cache} has {readable_size(free)} free. Nothing was downloaded. "
            "Free some space, set HF_HOME (or `cache_dir`) to a bigger disk, or give `checkpoint` (and `base`) as "
            "folders that you already have."
        )
    if needed >= LARGE_DOWNLOAD:  # a warning, which Python shows by default
        logger.warning(
            f"Downloading {readable_size(needed)} ({parts}) to {cache}, {readable_size(free)} free. This is done once; "
            "if interrupted, complete files are kept."
        )


def _fetch(planned: DownloadPlan) -> None:
    """All missing files of one plan into the cache; another attempt where that can help."""
    failures = 0
    while missing := planned.missing:
        for file in missing:  # what has another size, which huggingface_hub would take for the file
            _discard(planned.folder / file.name)
        failure: BaseException = ConnectionError("no connection")  # then huggingface_hub may return what is there
        try:
            snapshot_download(
                planned.repo_id,
                revision=planned.commit,
                cache_dir=planned.cache_dir,
                allow_patterns=[file.name for file in missing],
                max_workers=WORKERS,
                library_name=LIBRARY,
            )
        except LocalEntryNotFoundError as error:
            failure = error.__cause__ or error  # the request that failed
        except FETCH_ERRORS as error:
            failure = error
        left = planned.missing
        for file in missing:
            if file not in left:
                _check_hash(planned, file)
        failures = 1 if len(left) < len(missing) else failures + 1
        if left and (failures > len(PAUSES) or not _may_pass(failure)):
            raise _explained(failure, planned.repo_id, planned.revision, planned.cache_dir, planned) from failure
        if left:
            logger.warning("The download of %s was interrupted (%s); trying again.", planned.repo_id, _reason(failure))
            time.sleep(PAUSES[failures - 1])


def _check_hash(planned: DownloadPlan, file: HubFile) -> None:
    """Delete a fetched file that is not what the Hub lists, and raise `DownloadError`."""
    path = planned.folder / file.name
    is_sha256 = file.digest is not None and len(file.digest) == 64
    digest = hashlib.sha256() if is_sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)  # as git does
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    if file.digest not in (None, digest.hexdigest()):
        _discard(path)
        raise DownloadError(
            f"{file.name} of {planned.repo_id!r} arrived damaged: its content does not match its hash. It was deleted. "
            "Try again; if it happens again, the server or mirror (HF_ENDPOINT) or a proxy on the way is at fault."
        )


def _discard(path: Path) -> None:
    """Delete a file of a snapshot and the content that it links to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _may_pass(error: BaseException) -> bool:
    """Whether trying again can help: after a lost connection or a busy server, not a refusal."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return getattr(error, "errno", None) not in DISK_FULL | NO_ACCESS


def _explained(
    error: BaseException, repo_id: str, revision: str, cache: Path, fetched: DownloadPlan | None = None
) -> DownloadError:
    """What went wrong, why, and what to do next. `fetched`: the plan being fetched; None: the Hub was being asked."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    what = repr(repo_id) if fetched is None else f"{repo_id!r} ({fetched.absent()})"
    number, endpoint, reason = getattr(error, "errno", None), constants.ENDPOINT, _reason(error)
    if isinstance(error, RevisionNotFoundError):
        text = f"{repo_id!r} has no revision {revision!r}"
        advice = "Give a branch, a tag or a full commit hash that it has, or leave the revision out for its main branch"
    elif isinstance(error, RepositoryNotFoundError) and status == 404:
        text = f"{repo_id!r} was not found on {endpoint}, and there is no local folder of that name"
        advice = "Check the spelling of 'owner/name'; a private repository needs a token in HF_TOKEN"
    elif status in (401, 403):
        text = f"{endpoint} refuses {repo_id!r}: it is gated or private, or the token is wrong ({reason})"
        advice = (
            f"Open {endpoint}/{repo_id} in a browser and accept its licence; set HF_TOKEN to a token of "
            f"{endpoint}/settings/tokens (or run `hf auth login`). A public repository needs none: unset a wrong one"
        )
    elif number in DISK_FULL:
        text = f"The disk is full, or a quota is: {what} cannot be written to {cache} ({reason})"
        advice = "Free some space, or set HF_HOME (or `cache_dir`) to a bigger disk: complete files are kept"
    elif number in NO_ACCESS:
        text = f"The cache folder {cache} cannot be read and written ({reason})"
        advice = "Give yourself access, or set HF_HOME (or `cache_dir`) to a folder of your own"
    elif fetched is not None:
        text = f"{endpoint} did not deliver {what}: {reason}"
        advice = "Try again later, or another mirror (HF_ENDPOINT): complete files are kept"
    else:
        text = f"Could not ask {endpoint} for {repo_id!r}: {reason}"
        advice = (
            "Check the connection and proxy settings. Where the Hub is blocked, set HF_ENDPOINT to a mirror; on a "
            "machine without network, copy the checkpoint there and give its folder"
        )
    return DownloadError(f"{text}. {advice}.")


def _reason(error: BaseException) -> str:
    """Why, on one line. Addresses are left out: those of large files carry a signature."""
    if not isinstance(error, HfHubHTTPError):
        return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
    response = error.response
    answer = f"HTTP {response.status_code} {response.reason_phrase} from {response.url.host}"
    return f"{answer}: {error.server_message.rstrip('.')}" if error.server_message else answer
