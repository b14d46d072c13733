"""Checkpoints from the Hugging Face Hub: plan first (sizes, free disk), then fetch and verify.

`plan` asks the Hub what is missing and moves no weights; `download` checks the disk for all plans
together before the first byte; `fetch` is both for one repository. The files end up in the usual
Hub cache (`HF_HOME`, `HF_HUB_CACHE` or `cache_dir`), where every other tool finds them.
`HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_TOKEN` work as in all programs that use `huggingface_hub`.

Bytes are moved by huggingface_hub's `http_get`, and its `hf_hub_download` files them in the cache.
Since 1.18 the latter starts an interrupted file from zero (and Xet transfers always did), so the
partial file is kept by us, as `<hash>.incomplete`, where older versions kept it. Its danger, two
writers on a file system without locks, is met by checking the hash before a file enters the cache.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import are_symlinks_supported, http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, validate_repo_id

from ..errors import CheckpointError, DownloadError

logger = logging.getLogger("pyiqa_qscorer")

LARGE_DOWNLOAD = 10**9  # from here on the notice is a warning, which Python shows by default
ATTEMPTS = 4  # per file, without progress in between; http_get itself tries 6 times in each
PROGRESS = 2**20  # bytes that count as progress
DISK_MARGIN = 2**30  # left free beside the download, or 5 % of it where that is less

_LIBRARY = "pyiqa-qscorer"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
# HTTPError is the transport's base class (httpx or httpx2, by version of huggingface_hub).
_FETCH_ERRORS: tuple[type[Exception], ...] = (HTTPError, OSError, EntryNotFoundError)
# What answers may be no Hub: the page of a hotel's network, a mirror with an error in its JSON.
_LISTING_ERRORS: tuple[type[Exception], ...] = (*_FETCH_ERRORS, ValueError, LookupError, TypeError)

Select = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `digest`: SHA-256 if stored with LFS, else git's SHA-1, if listed."""

    name: str
    size: int | None
    digest: str | None = None


@dataclass(frozen=True)
class DownloadPlan:
    """What a checkpoint needs from one repository at one commit, and what of it is not here yet.

    `files`: the selected ones; `missing`: those not in the cache; `missing_bytes`: what is still
    to be transferred (partial files count as far as they go). `repo_files`: all that the Hub
    listed just now; empty if the plan comes from the cache alone.
    """

    repo_id: str
    revision: str
    commit: str
    cache_dir: Path
    files: tuple[HubFile, ...]
    missing: tuple[HubFile, ...]
    missing_bytes: int
    repo_files: tuple[HubFile, ...] = ()

    @property
    def names(self) -> list[str]:
        return [file.name for file in self.files]

    @property
    def store(self) -> Path:
        """Folder of the repository in the cache, with `blobs`, `snapshots` and `refs`."""
        return _store(self.cache_dir, self.repo_id)

    @property
    def folder(self) -> Path:
        """Folder with the files under their own names, once they are downloaded."""
        return self.store / "snapshots" / self.commit


# ---------------------------------------------------------------- what a checkpoint argument means


def is_local(checkpoint: str | os.PathLike[str], *, argument: str = "checkpoint") -> bool:
    """Whether `checkpoint` is a folder on this machine (True) or a Hub id "owner/name" (False).

    An existing folder always wins. What looks like a path and does not exist is never looked up on
    the Hub. Raises `CheckpointError` for that, for a file, and for what can be neither; `argument`
    is the name that the message gives it.
    """
    text = os.fspath(checkpoint)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return True
    if text and path.exists():
        raise CheckpointError(f"{argument}={text!r} is a file: give the folder that holds it.")
    is_path = isinstance(checkpoint, os.PathLike) or text.startswith((".", "~")) or "\\" in text
    if is_path or path.is_absolute() or text.count("/") > 1:
        raise CheckpointError(
            f"{argument}={text!r}: no such folder ({path.absolute()}). If you meant a model on the "
            "Hugging Face Hub, give its id as 'owner/name'."
        )
    _check_repo_id(text, argument)
    return False


def _check_repo_id(repo_id: str, argument: str) -> None:
    reason = ""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = f" ({error})"
    if reason or repo_id.count("/") != 1:
        raise CheckpointError(
            f"{argument}={repo_id!r} is neither an existing folder nor a Hugging Face Hub id of the "
            f"form 'owner/name'{reason}. Check the path, or write the id with its owner."
        )


def resolve(
    checkpoint: str | os.PathLike[str],
    revision: str | None = None,
    *,
    select: Select | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    needed_for: str | None = None,
    argument: str = "checkpoint",
) -> Path:
    """Folder of a checkpoint given as a local folder or as a Hub id (which is fetched)."""
    text = os.fspath(checkpoint)
    if not is_local(checkpoint, argument=argument):
        return fetch(
            text,
            revision,
            select=select,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            needed_for=needed_for,
        )
    if revision is not None:
        raise CheckpointError(
            f"revision {revision!r} was given for {argument}={text!r}, a local folder, which has no "
            "revisions. Leave it out, or give a Hub id 'owner/name'."
        )
    return Path(text).expanduser()


# ---------------------------------------------------------------- which files

_SETTINGS = re.compile(
    r"config\.json|\w+_config\.json|(special_tokens_map|added_tokens|tokenizer|vocab)\.json|\w+\.model"
)


def weight_files(names: Sequence[str]) -> list[str]:
    """The files of a checkpoint among `names`: weights, settings, tokenizer; nothing in subfolders.

    The model and the adapter are taken once: as safetensors if complete, otherwise as `.bin`.
    Optimizer states, scripts, pictures and other formats stay.
    """
    flat = [name for name in names if "/" not in name]
    chosen = [name for name in flat if _SETTINGS.fullmatch(name)]
    for stem, bin_stem in (("model", "pytorch_model"), ("adapter_model", "adapter_model")):
        stored = [
            _stored_weights(flat, stem, "safetensors"),
            _stored_weights(flat, bin_stem, "bin"),
        ]
        complete = [files for files, is_complete in stored if is_complete]
        chosen += next(iter(complete + [files for files, _ in stored if files]), [])
    return chosen + [name for name in flat if name == "non_lora_trainables.bin"]


def _stored_weights(names: Sequence[str], stem: str, suffix: str) -> tuple[list[str], bool]:
    """The files of one set of weights in one format, and whether all its shards are among them."""
    if f"{stem}.{suffix}" in names:
        return [f"{stem}.{suffix}"], True
    # Numbers come padded (00001-of-00002) or not (1-of-33), by age of the release.
    numbered = re.compile(rf"{stem}-0*(\d+)-of-0*(\d+)\.{suffix}")
    shards = {name: match for name in names if (match := numbered.fullmatch(name))}
    index = [name for name in names if name == f"{stem}.{suffix}.index.json"]
    complete = any(len(shards) == int(match[2]) for match in shards.values())
    return [*shards, *index], complete


# ---------------------------------------------------------------- plan


def plan(
    repo_id: str,
    revision: str | None = None,
    *,
    select: Select | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> DownloadPlan:
    """What is needed of `repo_id` at `revision` (branch, tag, commit hash; default: main branch).

    `select` picks from the repository's file names (default: `weight_files`). A commit hash that is
    complete in the cache is answered without a request. Otherwise one request asks the Hub; if that
    is not possible (`local_files_only`, `HF_HUB_OFFLINE=1`, no connection, no access any more) a
    complete cached copy is used. Raises `DownloadError` if there is neither, and if the repository
    or revision does not exist or is closed; `CheckpointError` if it holds nothing that is selected.
    """
    _check_repo_id(repo_id, "repo_id")
    select, revision = select or weight_files, revision or constants.DEFAULT_REVISION
    cache = _cache_folder(cache_dir)
    try:
        return _plan(repo_id, revision, select, cache, local_files_only)
    except OSError as error:  # of the cache folder, such as one of another user
        raise _explain(error, repo_id, revision, cache) from error


def _plan(repo_id: str, revision: str, select: Select, cache: Path, local_files_only: bool) -> DownloadPlan:
    cached = _cached_plans(repo_id, revision, select, cache)
    complete = next((candidate for candidate in cached if not candidate.missing), None)
    if complete is not None and (local_files_only or _COMMIT.fullmatch(revision)):
        return complete
    if local_files_only:
        raise _not_cached(repo_id, revision, cache, cached, "local_files_only is set")
    try:
        listed = _list_files(repo_id, revision, attempts=1 if complete else ATTEMPTS)
    except RevisionNotFoundError as error:
        raise _explain(error, repo_id, revision, cache) from error
    except OfflineModeIsEnabled as error:
        if complete is not None:
            return complete
        reason = "HF_HUB_OFFLINE=1 is set"
        raise _not_cached(repo_id, revision, cache, cached, reason) from error
    except _LISTING_ERRORS as error:
        explained = _explain(error, repo_id, revision, cache)
        if complete is None:
            raise explained from error
        logger.warning("%s Using the cached copy, commit %s.", explained, complete.commit)
        return complete
    commit, files = listed
    names = select(list(files))
    if not names:
        raise CheckpointError(
            f"{repo_id!r} at {revision!r} holds no file of a checkpoint; it has "
            f"{_some(sorted(files))}. Expected config.json beside model or adapter weights."
        )
    wanted = [files[name] for name in names]
    return _plan_of(repo_id, revision, commit, cache, wanted, tuple(files.values()))


def _list_files(repo_id: str, revision: str, attempts: int) -> tuple[str, dict[str, HubFile]]:
    """Ask the Hub: commit, and files by name. A closed repository is an error here already."""
    api = HfApi(library_name=_LIBRARY)
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    for attempt in range(1, attempts + 1):
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
            if info.gated:  # the list is public even then, the files are not
                api.auth_check(repo_id)
            break
        except _FETCH_ERRORS as error:
            if attempt == attempts or not _may_pass(error):
                raise
            time.sleep(2 ** (attempt - 1))
    if not _COMMIT.fullmatch(info.sha or ""):
        raise ValueError(f"the listing names no commit (sha: {info.sha!r})")
    files = {}
    for entry in info.siblings or ():
        digest = (entry.lfs.sha256 if entry.lfs else entry.blob_id) or ""
        is_hash = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest)
        files[entry.rfilename] = HubFile(entry.rfilename, entry.size, digest if is_hash else None)
    return str(info.sha), files


def _plan_of(
    repo_id: str,
    revision: str,
    commit: str,
    cache: Path,
    files: Sequence[HubFile],
    repo_files: tuple[HubFile, ...] = (),
) -> DownloadPlan:
    store = _store(cache, repo_id)
    snapshot = store / "snapshots" / commit
    missing = [file for file in files if not _has_size(snapshot / file.name, file.size)]
    to_fetch = [file for file in missing if not _has_size(_blob(store, file), file.size)]
    missing_bytes = sum(max((file.size or 0) - _size(_partial(_blob(store, file))), 0) for file in to_fetch)
    return DownloadPlan(repo_id, revision, commit, cache, tuple(files), tuple(missing), missing_bytes, repo_files)


def _cached_plans(repo_id: str, revision: str, select: Select, cache: Path) -> list[DownloadPlan]:
    """Plans from what the cache knows, most trusted first; nothing is asked from the network.

    A snapshot folder grows file by file, so its being there says nothing. Which files belong to it
    is taken from the list that `download` left, or else from the shard index and file numbering.
    """
    store = _store(cache, repo_id)
    lists = {path.stem: path for path in (store / _LIBRARY).glob("*.json")}
    if _COMMIT.fullmatch(revision):
        commits = [revision]
    else:
        ref = store / "refs" / revision
        commits = [ref.read_text().strip()] if ref.is_file() else []
        recent = sorted(lists.values(), key=lambda path: path.stat().st_mtime, reverse=True)
        commits += [path.stem for path in recent if _read_json(path).get("revision") == revision]
    plans = []
    for commit in dict.fromkeys(commits):
        if commit in lists and isinstance(sizes := _read_json(lists[commit]).get("files"), dict):
            files = [HubFile(name, sizes[name]) for name in select(list(sizes))]
        else:
            files = _files_by_structure(store / "snapshots" / commit, select)
        if files:
            plans.append(_plan_of(repo_id, revision, commit, cache, files))
    return plans


def _files_by_structure(folder: Path, select: Select) -> list[HubFile]:
    """The selected files of a snapshot without a list, and those that must lie beside them."""
    present = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    needed = set(select(present))
    for name in sorted(needed):
        if name.endswith(".index.json"):
            weight_map = _read_json(folder / name).get("weight_map")
            needed |= set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if match := re.fullmatch(r"(.+-)\d+-of-(\d+)(\.\w+)", name):
            head, total, suffix = match.groups()
            width = len(total) if total.startswith("0") else 0
            for number in range(1, int(total) + 1):
                needed.add(f"{head}{number:0{width}}-of-{total}{suffix}")
    if needed and select is weight_files:
        needed.add("config.json")
        stems = {Path(name).stem for name in needed}
        if "adapter_config.json" in needed:
            absent = {"adapter_model", "non_lora_trainables"} - stems
            needed |= {f"{stem}.bin" for stem in absent}
        elif not any(name.endswith((".bin", ".safetensors")) for name in needed):
            needed.add("model.safetensors")
    return [HubFile(name, None) for name in sorted(needed)]


# ---------------------------------------------------------------- download


def fetch(
    repo_id: str,
    revision: str | None = None,
    *,
    select: Select | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    needed_for: str | None = None,
) -> Path:
    """Folder with the selected files of one repository, downloaded where they are missing.

    Arguments and errors as for `plan` and `download`.
    """
    planned = plan(
        repo_id,
        revision,
        select=select,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return download([planned], needed_for=needed_for)[0]


def download(plans: Sequence[DownloadPlan], *, needed_for: str | None = None) -> list[Path]:
    """Fetch what the plans miss; returns their folders, in order.

    The disk is checked for the sum before the first byte. Files are fetched one after the other,
    resumed when the connection drops or an earlier run was stopped, and checked against the size
    and hash that the Hub lists. `needed_for` is named in messages. Raises `DownloadError`; what
    was fetched until then is kept, and the next call continues there.
    """
    check_disk(plans, needed_for=needed_for)
    _announce(plans, needed_for)
    for planned in plans:
        try:
            _record(planned)
            for number, file in enumerate(planned.missing, start=1):
                _fetch_file(planned, file, f"[{number}/{len(planned.missing)}] {file.name}")
            _record_revision(planned)
        except OSError as error:  # of the cache folder; those of a file are explained there
            if not planned.missing:  # complete, in a cache that must not be written: fine
                logger.debug("could not note %s in the cache: %s", planned.repo_id, error)
                continue
            where = planned.cache_dir
            raise _explain(error, planned.repo_id, planned.revision, where) from error
    return [planned.folder for planned in plans]


def check_disk(plans: Sequence[DownloadPlan], *, needed_for: str | None = None) -> None:
    """Raise `DownloadError` unless the disks of the caches have room for all plans together."""
    for cache in dict.fromkeys(planned.cache_dir for planned in plans):
        here = [planned for planned in plans if planned.cache_dir == cache]
        needed = sum(planned.missing_bytes for planned in here)
        margin = min(DISK_MARGIN, needed // 20)
        free = free_bytes(cache)
        if needed and needed + margin > free:
            raise DownloadError(
                f"Too little disk space: {readable_size(needed)} are to be downloaded"
                f"{_for(needed_for)} ({_parts(here)}), plus {readable_size(margin)} of reserve, but "
                f"{cache} has {readable_size(free)} free. Nothing was downloaded. Free some space, "
                "set HF_HOME (or `cache_dir`) to a bigger disk, or give `checkpoint` (and `base`) "
                "as folders that you already have."
            )


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where `folder` is or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def readable_size(size: int) -> str:
    """`size` bytes as people write it, in powers of ten as disks are sold: "16.4 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _announce(plans: Sequence[DownloadPlan], needed_for: str | None) -> None:
    missing = [planned for planned in plans if planned.missing_bytes]
    size = sum(planned.missing_bytes for planned in missing)
    if not missing:
        return
    logger.log(
        logging.WARNING if size >= LARGE_DOWNLOAD else logging.INFO,
        "Downloading %s%s (%s) to %s, %s free. This is done once; if interrupted, it resumes.",
        readable_size(size),
        _for(needed_for),
        _parts(missing),
        missing[0].cache_dir,
        readable_size(free_bytes(missing[0].cache_dir)),
    )


def _fetch_file(planned: DownloadPlan, file: HubFile, label: str) -> None:
    """One file into the cache; a bounded number of attempts, each continuing the one before."""
    blob = _blob(planned.store, file)
    best, failures = _size(_partial(blob)), 0
    while True:
        try:
            return _fetch_file_once(planned, file, label)
        except _FETCH_ERRORS as error:
            done = _size(_partial(blob))
            failures = 1 if done >= best + PROGRESS else failures + 1
            best = max(best, done)
            if failures >= ATTEMPTS or not _may_pass(error):
                where = planned.cache_dir
                raise _explain(error, planned.repo_id, planned.revision, where, file, done) from error
            logger.warning(
                "Fetching %s was interrupted after %s of %s (%s); continuing there.",
                file.name,
                readable_size(done),
                readable_size(file.size or 0),
                _reason(error),
            )
            time.sleep(2 ** (failures - 1))


def _fetch_file_once(planned: DownloadPlan, file: HubFile, label: str) -> None:
    blob, pointer = _blob(planned.store, file), planned.folder / file.name
    url = hf_hub_url(planned.repo_id, file.name, revision=planned.commit)
    served = get_hf_file_metadata(url).etag
    if pointer.exists() and not _has_size(pointer, file.size):
        pointer.unlink()
    if file.digest is not None and served == file.digest:
        # hf_hub_download takes the same lock, so it must be free again when that is called.
        lock = planned.cache_dir / ".locks" / planned.store.name / f"{served}.lock"
        for folder in (lock.parent, blob.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not _has_size(blob, file.size):
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
        library_name=_LIBRARY,
    )
    if not _has_size(pointer, file.size):
        found = _size(pointer)
        pointer.resolve().unlink(missing_ok=True)
        pointer.unlink(missing_ok=True)
        raise _damaged(planned.repo_id, file, f"its size is {found} bytes, not {file.size}")


def _fetch_blob(url: str, blob: Path, file: HubFile, label: str, repo_id: str) -> None:
    """Download into `<blob>.incomplete`, continuing what is there; verify; move to `blob`."""
    partial = _partial(blob)
    # Ranges of a compressed answer would not fit to the bytes on disk.
    headers = {**build_hf_headers(library_name=_LIBRARY), "Accept-Encoding": "identity"}
    for found in (_size(partial), 0):
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
    raise _damaged(repo_id, file, "its content does not match its hash")


def _digest(path: Path, file: HubFile) -> str:
    """Hash of `path` of the same kind as `file.digest`: SHA-256, or git's SHA-1 of a blob."""
    is_sha256 = file.digest is not None and len(file.digest) == 64
    digest = hashlib.sha256() if is_sha256 else hashlib.sha1(b"blob %d\0" % _size(path))
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- the cache on disk


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()


def _store(cache: Path, repo_id: str) -> Path:
    return cache / repo_folder_name(repo_id=repo_id, repo_type="model")


def _blob(store: Path, file: HubFile) -> Path:
    """Where the content of `file` lies in the cache: under its hash."""
    return store / "blobs" / (file.digest or "hash-not-listed")


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _size(path: Path) -> int:
    # Asked once, not "exists, then size": another process may move the file in between.
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _has_size(path: Path, size: int | None) -> bool:
    return path.is_file() and size in (None, _size(path))


def _record(planned: DownloadPlan) -> None:
    """Note the commit's files in the cache, so that a run without network knows what is missing."""
    note = planned.store / _LIBRARY / f"{planned.commit}.json"
    if planned.repo_files and (planned.missing or not note.exists()):
        sizes = {file.name: file.size for file in planned.repo_files}
        _write(note, json.dumps({"revision": planned.revision, "files": sizes}, indent=1))


def _record_revision(planned: DownloadPlan) -> None:
    """Let the branch or tag point to the commit, now that it is complete."""
    ref = planned.store / "refs" / planned.revision
    is_known = ref.is_file() and ref.read_text() == planned.commit
    if planned.repo_files and planned.revision != planned.commit and not is_known:
        _write(ref, planned.commit)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    whole.write_text(text)
    os.replace(whole, path)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the cache; empty if it cannot be read, which then counts as not there."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        logger.debug("%s cannot be read: %s", path, error)
        return {}
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------- what went wrong


def _may_pass(error: BaseException) -> bool:
    """Whether trying again can help: a lost connection or a busy server, not a refusal."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # huggingface_hub hides a failed request behind "not in the cache"
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    refused = isinstance(error, OfflineModeIsEnabled)
    return not refused and getattr(error, "errno", None) not in _DISK_FULL | _NO_ACCESS


def _explain(
    error: BaseException,
    repo_id: str,
    revision: str,
    cache: Path,
    file: HubFile | None = None,
    done: int = 0,
) -> DownloadError:
    """The error in the words of who typed the command: what, why, what to do next."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status, number = _status(error), getattr(error, "errno", None)
    endpoint, reason = constants.ENDPOINT, _reason(error)
    what = repr(repo_id) if file is None else f"{file.name} of {repo_id!r}"
    if isinstance(error, GatedRepoError) or status == 403:
        text = (
            f"{repo_id!r} is gated or closed to you. Open {endpoint}/{repo_id} in a browser, "
            f"accept its licence, create a token under {endpoint}/settings/tokens, set HF_TOKEN "
            f"to it (or run `hf auth login`) and try again. ({reason})"
        )
    elif isinstance(error, RepositoryNotFoundError):
        text = (
            f"{repo_id!r} was not found on {endpoint}, and there is no local folder of that name. "
            "Check the spelling of 'owner/name'; a private repository needs a token in HF_TOKEN."
        )
    elif isinstance(error, RevisionNotFoundError):
        text = (
            f"{repo_id!r} has no revision {revision!r}. Give a branch, a tag or a full commit hash "
            "that it has, or leave the revision out for its main branch."
        )
    elif status == 401:
        text = (
            f"{endpoint} refused the access token for {repo_id!r} ({reason}). Set HF_TOKEN to a "
            "valid token, or unset it (and run `hf auth logout`): public repositories need none."
        )
    elif status == 404:
        text = f"{what} is not there any more on {endpoint} ({reason}). Try again."
    elif number in _DISK_FULL:
        text = (
            "The disk is full, or a quota or file size limit is reached: "
            f"writing {what} to {cache} stopped after {readable_size(done)} "
            f"({reason}; {readable_size(free_bytes(cache))} free). Free some space, or set "
            "HF_HOME (or `cache_dir`) to a bigger disk, and try again: it continues there."
        )
    elif number in _NO_ACCESS:
        text = (
            f"The cache folder {cache} cannot be read and written ({reason}). Give yourself access, or "
            "set HF_HOME (or `cache_dir`) to a folder of your own."
        )
    elif status == 416 and file is not None:
        text = (
            f"{endpoint} has less of {what} than it lists ({readable_size(done)} of {file.size} "
            "bytes are here). Try again later, or another mirror (HF_ENDPOINT)."
        )
    elif status is not None:
        text = f"{endpoint} did not deliver {what}: {reason}. Try again later."
    elif file is None:
        text = (
            f"Could not ask {endpoint} for {what}: {reason}. Check the connection and proxy "
            "settings. Where the Hub is blocked, set HF_ENDPOINT to a mirror; on a machine without "
            "network, copy the checkpoint there and give its folder."
        )
    else:
        text = (
            f"The connection was lost while fetching {what} from {endpoint}, after "
            f"{readable_size(done)} of {readable_size(file.size or 0)}, and could not be resumed "
            f"({reason}). Try again: what was fetched is kept, and it continues there."
        )
    return DownloadError(text)


def _damaged(repo_id: str, file: HubFile, how: str) -> DownloadError:
    return DownloadError(
        f"{file.name} of {repo_id!r} arrived damaged: {how}. It was deleted. Try again; if it "
        "happens again, the server or mirror (HF_ENDPOINT) or a proxy on the way is at fault."
    )


def _not_cached(repo_id: str, revision: str, cache: Path, cached: Sequence[DownloadPlan], why: str) -> DownloadError:
    begun = [planned for planned in cached if len(planned.missing) < len(planned.files)]
    if begun:
        absent, total = [file.name for file in begun[0].missing], len(begun[0].files)
        state = (
            f"is only partly in the cache {cache}: {len(absent)} of {total} files are missing "
            f"({_some(absent)}), an earlier download was interrupted"
        )
    else:
        state = f"(revision {revision!r}) is not in the cache {cache}"
    return DownloadError(
        f"{repo_id!r} {state}, and nothing may be downloaded because {why}. Run once with network "
        "access (what is there is kept and resumed), set HF_HOME (or `cache_dir`) to a cache that "
        "holds it, or give a local folder."
    )


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _reason(error: BaseException) -> str:
    """Why, on one line. Addresses are left out: those of large files carry a signature."""
    if not isinstance(error, HfHubHTTPError):
        return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
    response = error.response
    answer = f"HTTP {response.status_code} {response.reason_phrase} from {response.url.host}"
    return f"{answer}: {error.server_message.rstrip('.')}" if error.server_message else answer


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _for(needed_for: str | None) -> str:
    return f" for {needed_for}" if needed_for else ""


def _parts(plans: Sequence[DownloadPlan]) -> str:
    return ", ".join(f"{p.repo_id}: {readable_size(p.missing_bytes)}" for p in plans)
