"""Where a checkpoint is: folders on this machine or repositories on the Hugging Face Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import CheckpointError
from . import hub
from .layouts import has_lora_files, is_lora_folder

PathOrId = str | os.PathLike[str]


@dataclass(frozen=True)
class CheckpointSource:
    """Where a checkpoint is, as the options of every metric say it.

    Attributes:
        checkpoint: folder on this machine or Hub id "owner/name", in any of the three layouts.
        base: the same for the model under a LoRA checkpoint; not looked at where none is needed.
        revision, base_revision: branch, tag or commit on the Hub; None: the main branch.
        local_files_only: never go to the network.
        cache_dir: folder of downloads; None: the Hub's own cache.
    """

    checkpoint: PathOrId
    base: PathOrId | None = None
    revision: str | None = None
    base_revision: str | None = None
    local_files_only: bool = False
    cache_dir: PathOrId | None = None

    def plan(self) -> list[Path | hub.DownloadPlan]:
        """The checkpoint and, for a LoRA one, its base: each a local folder or a download plan.

        Raises:
            CheckpointError: no such folder, or a LoRA checkpoint without a base.
            DownloadError: the Hub cannot be asked and the cache has no complete copy.
        """
        part = self._locate("checkpoint", self.checkpoint, self.revision)
        if not (is_lora_folder(part) if isinstance(part, Path) else has_lora_files(file.name for file in part.files)):
            return [part]
        if self.base is None:
            raise CheckpointError(
                f"checkpoint {os.fspath(self.checkpoint)!r} is a LoRA: give the model it was trained on as base=, "
                "e.g. MAGAer13/mplug-owl2-llama2-7b"
            )
        return [part, self._locate("base", self.base, self.base_revision)]

    def fetch(self) -> list[Path]:
        """Folders of the checkpoint and, for a LoRA one, of its base; downloaded where they are not local.

        Free disk is compared with the sum of both before the first byte.

        Raises:
            CheckpointError, DownloadError: as `plan`, or a download fails.
        """
        parts = self.plan()
        fetched = iter(hub.download([part for part in parts if not isinstance(part, Path)]))
        return [part if isinstance(part, Path) else next(fetched) for part in parts]

    def _locate(self, argument: str, place: PathOrId, revision: str | None) -> Path | hub.DownloadPlan:
        if not is_local(place, argument):
            return hub.plan(
                os.fspath(place), revision, cache_dir=self.cache_dir, local_files_only=self.local_files_only
            )
        if revision is not None:
            raise CheckpointError(
                f"revision {revision!r} was given for {argument}={os.fspath(place)!r}, a local folder, which has no "
                "revisions. Leave it out, or give a Hub id 'owner/name'."
            )
        return Path(place).expanduser()


def is_local(place: PathOrId, argument: str = "checkpoint") -> bool:
    """Whether `place` is a folder on this machine (True) or a Hub id "owner/name" (False).

    An existing folder always wins. What looks like a path and does not exist is never looked up on the Hub.

    Args:
        argument: what messages call it.

    Raises:
        CheckpointError: a path that does not exist, a file, or what can be neither.
    """
    text = os.fspath(place)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return True
    if text and path.exists():
        raise CheckpointError(f"{argument}={text!r} is a file: give the folder that holds it.")
    is_path = isinstance(place, os.PathLike) or text.startswith((".", "~")) or "\\" in text
    if is_path or path.is_absolute() or text.count("/") > 1:
        raise CheckpointError(
            f"{argument}={text!r}: no such folder ({path.absolute()}). If you meant a model on the Hugging Face Hub, "
            "give its id as 'owner/name'."
        )
    reason = ""
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        reason = f" ({error})"
    if reason or text.count("/") != 1:
        raise CheckpointError(
            f"{argument}={text!r} is neither an existing folder nor a Hugging Face Hub id of the form 'owner/name'"
            f"{reason}. Check the path, or write the id with its owner."
        )
    return False
