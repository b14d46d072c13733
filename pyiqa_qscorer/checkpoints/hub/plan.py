"""The plan of a download: what is needed, from the Hub's list of files or from the cache alone."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

from ...errors import CheckpointError
from .arguments import check_repo_id
from .cache import LIBRARY, blob_path, cache_folder, has_size, partial_path, read_json, size_of
from .failures import ATTEMPTS, FETCH_ERRORS, LISTING_ERRORS, explain, may_pass, not_cached, some_of
from .files import DownloadPlan, HubFile, store_of, weight_files

logger = logging.getLogger("pyiqa_qscorer")

_COMMIT = re.compile(r"[0-9a-f]{40}")


def plan(
    repo_id: str,
    revision: str | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> DownloadPlan:
    """What is needed of `repo_id` at `revision` (branch, tag, commit hash; default: main branch).

    A commit hash that is complete in the cache is answered without a request. Otherwise one request
    asks the Hub; if that is not possible (`local_files_only`, `HF_HUB_OFFLINE=1`, no connection, no
    access any more) a complete cached copy is used. Raises `DownloadError` if there is neither, and if the repository
    or revision does not exist or is closed; `CheckpointError` if it holds no file of a checkpoint.
    """
    check_repo_id(repo_id, "repo_id")
    revision = revision or constants.DEFAULT_REVISION
    cache = cache_folder(cache_dir)
    try:
        return _plan(repo_id, revision, cache, local_files_only)
    except OSError as error:  # of the cache folder, such as one of another user
        raise explain(error, repo_id, revision, cache) from error


def _plan(repo_id: str, revision: str, cache: Path, local_files_only: bool) -> DownloadPlan:
    cached = _cached_plans(repo_id, revision, cache)
    complete = next((candidate for candidate in cached if not candidate.missing), None)
    if complete is not None and (local_files_only or _COMMIT.fullmatch(revision)):
        return complete
    if local_files_only:
        raise not_cached(repo_id, revision, cache, cached, "local_files_only is set")
    try:
        listed = _list_files(repo_id, revision, attempts=1 if complete else ATTEMPTS)
    except RevisionNotFoundError as error:
        raise explain(error, repo_id, revision, cache) from error
    except OfflineModeIsEnabled as error:
        if complete is not None:
            return complete
        reason = "HF_HUB_OFFLINE=1 is set"
        raise not_cached(repo_id, revision, cache, cached, reason) from error
    except LISTING_ERRORS as error:
        explained = explain(error, repo_id, revision, cache)
        if complete is None:
            raise explained from error
        logger.warning("%s Using the cached copy, commit %s.", explained, complete.commit)
        return complete
    commit, files = listed
    names = weight_files(list(files))
    if not names:
        raise CheckpointError(
            f"{repo_id!r} at {revision!r} holds no file of a checkpoint; it has "
            f"{some_of(sorted(files))}. Expected config.json beside model or adapter weights."
        )
    wanted = [files[name] for name in names]
    return _plan_of(repo_id, revision, commit, cache, wanted, tuple(files.values()))


def _list_files(repo_id: str, revision: str, attempts: int) -> tuple[str, dict[str, HubFile]]:
    """Ask the Hub: commit, and files by name. A closed repository is an error here already."""
    api = HfApi(library_name=LIBRARY)
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    for attempt in range(1, attempts + 1):
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
            if info.gated:  # the list is public even then, the files are not
                api.auth_check(repo_id)
            break
        except FETCH_ERRORS as error:
            if attempt == attempts or not may_pass(error):
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
    store = store_of(cache, repo_id)
    snapshot = store / "snapshots" / commit
    missing = [file for file in files if not has_size(snapshot / file.name, file.size)]
    to_fetch = [file for file in missing if not has_size(blob_path(store, file), file.size)]
    missing_bytes = sum(max((file.size or 0) - size_of(partial_path(blob_path(store, file))), 0) for file in to_fetch)
    return DownloadPlan(repo_id, revision, commit, cache, tuple(files), tuple(missing), missing_bytes, repo_files)


def _cached_plans(repo_id: str, revision: str, cache: Path) -> list[DownloadPlan]:
    """Plans from what the cache knows, most trusted first; nothing is asked from the network.

    A snapshot folder grows file by file, so its being there says nothing. Which files belong to it
    is taken from the list that `download` left, or else from the shard index and file numbering.
    """
    store = store_of(cache, repo_id)
    lists = {path.stem: path for path in (store / LIBRARY).glob("*.json")}
    if _COMMIT.fullmatch(revision):
        commits = [revision]
    else:
        ref = store / "refs" / revision
        commits = [ref.read_text().strip()] if ref.is_file() else []
        recent = sorted(lists.values(), key=lambda path: path.stat().st_mtime, reverse=True)
        commits += [path.stem for path in recent if read_json(path).get("revision") == revision]
    plans = []
    for commit in dict.fromkeys(commits):
        if commit in lists and isinstance(sizes := read_json(lists[commit]).get("files"), dict):
            files = [HubFile(name, sizes[name]) for name in weight_files(list(sizes))]
        else:
            files = _files_by_structure(store / "snapshots" / commit)
        if files:
            plans.append(_plan_of(repo_id, revision, commit, cache, files))
    return plans


def _files_by_structure(folder: Path) -> list[HubFile]:
    """The files of a checkpoint in a snapshot without a list, and those that must lie beside them."""
    present = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    needed = set(weight_files(present))
    for name in sorted(needed):
        if name.endswith(".index.json"):
            weight_map = read_json(folder / name).get("weight_map")
            needed |= set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if match := re.fullmatch(r"(.+-)\d+-of-(\d+)(\.\w+)", name):
            head, total, suffix = match.groups()
            width = len(total) if total.startswith("0") else 0
            for number in range(1, int(total) + 1):
                needed.add(f"{head}{number:0{width}}-of-{total}{suffix}")
    if needed:
        needed.add("config.json")
        stems = {Path(name).stem for name in needed}
        if "adapter_config.json" in needed:
            absent = {"adapter_model", "non_lora_trainables"} - stems
            needed |= {f"{stem}.bin" for stem in absent}
        elif not any(name.endswith((".bin", ".safetensors")) for name in needed):
            needed.add("model.safetensors")
    return [HubFile(name, None) for name in sorted(needed)]
