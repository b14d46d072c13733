"""The files of a repository: which of them a checkpoint needs, and what of those is not here yet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.file_download import repo_folder_name

_SETTINGS = re.compile(
    r"config\.json|\w+_config\.json|(special_tokens_map|added_tokens|tokenizer|vocab)\.json|\w+\.model"
)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `digest`: SHA-256 if stored with LFS, else git's SHA-1, if listed."""

    name: str
    size: int | None
    digest: str | None = None


@dataclass(frozen=True)
class DownloadPlan:
    """What a checkpoint needs from one repository at one commit, and what of it is not here yet.

    `files`: those of `weight_files`; `missing`: those not in the cache; `missing_bytes`: what is still
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
        return store_of(self.cache_dir, self.repo_id)

    @property
    def folder(self) -> Path:
        """Folder with the files under their own names, once they are downloaded."""
        return self.store / "snapshots" / self.commit


def store_of(cache: Path, repo_id: str) -> Path:
    """Folder of a repository in the cache."""
    return cache / repo_folder_name(repo_id=repo_id, repo_type="model")


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
