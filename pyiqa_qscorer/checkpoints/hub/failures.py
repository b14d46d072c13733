"""What went wrong, in the words of who typed the command: what, why, what to do next."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ...errors import DownloadError
from ...files import readable_size
from .cache import free_bytes
from .files import DownloadPlan, HubFile

ATTEMPTS = 4  # per file, without progress in between; http_get itself tries 6 times in each
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
# HTTPError is the transport's base class (httpx or httpx2, by version of huggingface_hub).
FETCH_ERRORS: tuple[type[Exception], ...] = (HTTPError, OSError, EntryNotFoundError)
# What answers may be no Hub: the page of a hotel's network, a mirror with an error in its JSON.
LISTING_ERRORS: tuple[type[Exception], ...] = (*FETCH_ERRORS, ValueError, LookupError, TypeError)


def may_pass(error: BaseException) -> bool:
    """Whether trying again can help: a lost connection or a busy server, not a refusal."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # huggingface_hub hides a failed request behind "not in the cache"
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    refused = isinstance(error, OfflineModeIsEnabled)
    return not refused and getattr(error, "errno", None) not in _DISK_FULL | _NO_ACCESS


def explain(
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
    endpoint, reason = constants.ENDPOINT, reason_of(error)
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


def damaged(repo_id: str, file: HubFile, how: str) -> DownloadError:
    """The error for a file that is not what the Hub lists, `how` says in what."""
    return DownloadError(
        f"{file.name} of {repo_id!r} arrived damaged: {how}. It was deleted. Try again; if it "
        "happens again, the server or mirror (HF_ENDPOINT) or a proxy on the way is at fault."
    )


def not_cached(repo_id: str, revision: str, cache: Path, cached: Sequence[DownloadPlan], why: str) -> DownloadError:
    """The error where `why` forbids to download and `cached` holds no complete plan."""
    begun = [planned for planned in cached if len(planned.missing) < len(planned.files)]
    if begun:
        absent, total = [file.name for file in begun[0].missing], len(begun[0].files)
        state = (
            f"is only partly in the cache {cache}: {len(absent)} of {total} files are missing "
            f"({some_of(absent)}), an earlier download was interrupted"
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


def reason_of(error: BaseException) -> str:
    """Why, on one line. Addresses are left out: those of large files carry a signature."""
    if not isinstance(error, HfHubHTTPError):
        return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
    response = error.response
    answer = f"HTTP {response.status_code} {response.reason_phrase} from {response.url.host}"
    return f"{answer}: {error.server_message.rstrip('.')}" if error.server_message else answer


def some_of(names: Sequence[str]) -> str:
    """The first five `names`, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def sizes_by_repository(plans: Sequence[DownloadPlan]) -> str:
    """What is to be downloaded of each plan."""
    return ", ".join(f"{p.repo_id}: {readable_size(p.missing_bytes)}" for p in plans)
