"""Checkpoints: fetched from the Hub or read from a folder, in any of the three layouts, and written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from . import hub
from .layouts import CheckpointFolder, Layout, has_lora_files, is_lora_folder, recognise, weight_shards
from .load import LoadedCheckpoint, Precision, half_precision, load_folder
from .save import SavedLayout, check_output, save_folder, save_lora_folder

if TYPE_CHECKING:
    import torch

PathOrId = str | os.PathLike[str]

__all__ = [
    "CheckpointFolder",
    "Layout",
    "LoadedCheckpoint",
    "PathOrId",
    "Precision",
    "SavedLayout",
    "download_checkpoint",
    "half_precision",
    "load_checkpoint",
    "load_folder",
    "merge_checkpoint",
    "plan_checkpoint",
    "recognise",
    "save_folder",
    "save_lora_folder",
]


def plan_checkpoint(
    checkpoint: PathOrId,
    base: PathOrId | None = None,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: PathOrId | None = None,
) -> list[Path | hub.DownloadPlan]:
    """What a checkpoint consists of: a local folder or a download plan for it and, for a LoRA one, for its base.

    The base of a checkpoint that needs none is not looked at.

    Raises:
        CheckpointError: no such folder, or a LoRA checkpoint without a base.
        DownloadError: the Hub cannot be asked and the cache has no complete copy.
    """

    def locate(source: PathOrId, source_revision: str | None, argument: str) -> Path | hub.DownloadPlan:
        if hub.is_local(source, argument=argument):
            if source_revision is not None:
                raise CheckpointError(
                    f"revision {source_revision!r} was given for {argument}={os.fspath(source)!r}, a local folder, "
                    "which has no revisions. Leave it out, or give a Hub id 'owner/name'."
                )
            return Path(source).expanduser()
        return hub.plan(os.fspath(source), source_revision, cache_dir=cache_dir, local_files_only=local_files_only)

    part = locate(checkpoint, revision, "checkpoint")
    if not (is_lora_folder(part) if isinstance(part, Path) else has_lora_files(part.names)):
        return [part]
    if base is None:
        raise CheckpointError(
            f"checkpoint {os.fspath(checkpoint)!r} is a LoRA: give the model it was trained on as base=, "
            "e.g. MAGAer13/mplug-owl2-llama2-7b"
        )
    return [part, locate(base, base_revision, "base")]


def download_checkpoint(
    checkpoint: PathOrId,
    base: PathOrId | None = None,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: PathOrId | None = None,
) -> list[Path]:
    """Folder of a checkpoint and, for a LoRA one, of its base; both fetched where they are not local.

    Free disk is compared with the sum of both before the first byte. Raises as `plan_checkpoint`, and `DownloadError`.
    """
    parts = plan_checkpoint(
        checkpoint,
        base,
        revision=revision,
        base_revision=base_revision,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    plans = [part for part in parts if isinstance(part, hub.DownloadPlan)]
    fetched = iter(hub.download(plans))
    return [part if isinstance(part, Path) else next(fetched) for part in parts]


def load_checkpoint(
    checkpoint: PathOrId,
    base: PathOrId | None = None,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    dtype: Precision = "auto",
    prompt: str | None = None,
    attn_implementation: str | None = None,
    local_files_only: bool = False,
    cache_dir: PathOrId | None = None,
    device: str | torch.device | None = None,
) -> LoadedCheckpoint:
    """Fetch where needed and load; see `download_checkpoint` and `load_folder` for arguments and errors.

    Example:
        >>> from pyiqa_qscorer.registry import MINI_CHECKPOINT
        >>> load_checkpoint(MINI_CHECKPOINT).model.config.model_type
        'qscorer'
    """
    folders = download_checkpoint(
        checkpoint,
        base,
        revision=revision,
        base_revision=base_revision,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    return load_folder(
        *folders,
        dtype=dtype,
        prompt=prompt,
        attn_implementation=attn_implementation,
        device=device,
    )


def merge_checkpoint(
    output: PathOrId,
    checkpoint: PathOrId,
    base: PathOrId | None = None,
    *,
    layout: SavedLayout = "qscorer",
    dtype: Precision = "float16",
    revision: str | None = None,
    base_revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: PathOrId | None = None,
) -> Path:
    """Write any checkpoint as one folder that loads without a base, and faster.

    Args:
        layout: `qscorer` (ours) or `published` (for the published code).
        dtype: precision of the written weights; float16 is the published one.

    Raises:
        CheckpointError, DownloadError: see `load_checkpoint` and `save_folder`.
        ValueError: a `dtype` that cannot be written.
    """
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"dtype must be float16, bfloat16 or float32 to be written, got {dtype!r}")
    folders = download_checkpoint(
        checkpoint,
        base,
        revision=revision,
        base_revision=base_revision,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    folder = recognise(*folders)
    stored = sum(shard.stat().st_size for shard in weight_shards(folder.base or folder.path))
    check_output(Path(output), layout, folder.tokenizer_folder, stored * (2 if dtype == "float32" else 1))
    loaded = load_folder(*folders, dtype=dtype)
    return save_folder(
        Path(output),
        loaded.model,
        loaded.tokenizer,
        layout=layout,
        tokenizer_source=loaded.folder.tokenizer_folder,
    )
