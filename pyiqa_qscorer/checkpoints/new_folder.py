"""A checkpoint folder that is there when it is complete, and not before."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError
from ..files import free_bytes, readable_size

SavedLayout = Literal["qscorer", "published"]
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: Path, layout: SavedLayout, tokenizer_source: Path | None, size: int = 0) -> None:
    """Raise what `save_folder` would, before a long load: bad layout, output in the way, no room for `size` bytes."""
    if layout not in get_args(SavedLayout):
        raise ValueError(f"layout must be one of {', '.join(get_args(SavedLayout))}, got {layout!r}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"output must be a new or empty folder, got {output}")
    if layout == "published" and (tokenizer_source is None or not (tokenizer_source / "tokenizer.model").exists()):
        raise CheckpointError(f"layout 'published' needs the original tokenizer.model, not found in {tokenizer_source}")
    if (free := free_bytes(output)) < size:
        raise CheckpointError(
            f"output {output} needs {readable_size(size)} of disk, which has {readable_size(free)} free; make room or "
            "choose another disk"
        )


def write_notes(folder: Path, notes: Mapping[str, str]) -> None:
    for name, text in notes.items():
        (folder / name).write_text(text, encoding="utf-8")


def disk_is_full(error: Exception) -> bool:
    """Whether a failed write says so. Only Python's own errors have a number for it."""
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    if isinstance(error, SafetensorError):  # in its text only
        return any(f"os error {number}" in str(error) for number in FULL_DISK)
    # torch.save has one of several texts, none of which names a cause: what counts is that it could not write.
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "save" and frame.filename == torch.serialization.__file__ for frame in frames)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` when the block ends well, and vanishes otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield unfinished
        mask = os.umask(0)  # mkdtemp and safetensors ignore it: only the owner could read what they make
        os.umask(mask)
        for file in unfinished.iterdir():
            file.chmod(0o666 & ~mask)
        unfinished.chmod(0o777 & ~mask)
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not disk_is_full(error):
            raise
        full = "the disk is full: " * disk_is_full(error)
        raise CheckpointError(f"could not write {output}: {full}{error}; nothing was left behind") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
