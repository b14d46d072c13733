"""Where a checkpoint is: folders on this machine or repositories on the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import CheckpointError
from ..files import read_json
from ..registry import PUBLISHED_BASE
from . import hub
from .layouts import ADAPTER_CONFIG, VLM_CONFIG, has_lora_files

PathOrId = str | os.PathLike[str]


@dataclass(frozen=True)
class CheckpointSource:
    """Where a checkpoint is, as the options of every metric say it.

    Attributes:
        checkpoint: folder on this machine or Hub id "owner/name", in any layout.
        base: the same for the model under adapters; not looked at where none is needed, or where the adapters name it.
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
        if isinstance(part, Path) and (part / VLM_CONFIG).exists():
            return [part, *self._backbone(part)]
        names = [entry.name for entry in part.iterdir()] if isinstance(part, Path) else [one.name for one in part.files]
        if VLM_CONFIG in names or not has_lora_files(names):  # what an adapter's backbone is, its own file says
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
        folders = _fetched(self.plan())
        if len(folders) == 1 and (folders[0] / VLM_CONFIG).exists():
            folders += _fetched(self._backbone(folders[0]))
        return folders

    def _backbone(self, adapter: Path) -> list[Path | hub.DownloadPlan]:
        """Where the backbone of an adapter is; nothing for a merged folder.

        The published base, which the options of metric `qscorer` name, is none: the adapter says its own.
        """
        if not (adapter / ADAPTER_CONFIG).exists():
            return []
        if self.base is not None and os.fspath(self.base) != PUBLISHED_BASE:
            return [self._locate("base", self.base, self.base_revision)]
        config = read_json(adapter / VLM_CONFIG)
        return [self._locate("base", str(config.get("base")), self.base_revision or config.get("base_revision"))]

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


def _fetched(parts: Sequence[Path | hub.DownloadPlan]) -> list[Path]:
    fetched = iter(hub.download([part for part in parts if not isinstance(part, Path)]))
    return [part if isinstance(part, Path) else next(fetched) for part in parts]


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
