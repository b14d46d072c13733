"""What a checkpoint argument means: a folder on this machine, or an id on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ...errors import CheckpointError


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
    check_repo_id(text, argument)
    return False


def check_repo_id(repo_id: str, argument: str) -> None:
    """Raise `CheckpointError`, about `argument`, unless `repo_id` can be an id "owner/name"."""
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
