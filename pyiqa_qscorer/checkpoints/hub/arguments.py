"""What a checkpoint argument means: a folder on this machine, or an id on the Hugging Face Hub."""

from __future__ import annotations

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ...errors import CheckpointError


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
