"""Writing checkpoints in any of the three layouts."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import CheckpointError
from ..files import free_bytes, readable_size
from ..model import QScorerForScoring
from .layouts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, NON_LORA_WEIGHTS, recognise, weight_shards, write_json
from .load import Precision, load_folder
from .published_layout import image_settings, save_published_tokenizer
from .source import CheckpointSource

if TYPE_CHECKING:  # peft takes seconds to import, and scoring does not need it
    from peft import LoraConfig, PeftModel

SavedLayout = Literal["qscorer", "published"]
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_IN_BASE = ("model.embed_tokens.", "lm_head.", "deepmlp.")  # new rows and the regressor, trained or not


def save_folder(
    output: Path,
    model: QScorerForScoring,
    tokenizer: PreTrainedTokenizerBase,
    *,
    layout: SavedLayout = "qscorer",
    tokenizer_source: Path | None = None,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write a checkpoint that loads by itself.

    The files go to a temporary folder beside `output`, which is renamed when all are complete.

    Args:
        layout: `qscorer` (ours) or `published` (the merged layout that the published code reads; it needs LLaMA's
            `tokenizer.model`, taken from `tokenizer_source`).
        notes: text files to put beside the weights, by name.

    Raises:
        CheckpointError: `output` exists and is not an empty folder, the disk is full, or the tokenizer file is missing.
    """
    check_output(output, layout, tokenizer_source)
    source = None if tokenizer_source is None else tokenizer_source / "tokenizer.model"
    with _new_folder(output) as folder:
        # Small shards, because a loader's mapped pages add up to one shard.
        model.save_pretrained(folder, max_shard_size="1GB")
        if layout == "qscorer":
            tokenizer.save_pretrained(folder)
        else:
            dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
            write_json(folder / "config.json", {**model.config.to_published(), "torch_dtype": dtype})
            save_published_tokenizer(folder, model.config.score_tokens, model.config.score_token_ids, source)
        write_json(folder / "preprocessor_config.json", image_settings(model.config.vision_config.image_size))
        _write_notes(folder, notes)
    return output


def merge_checkpoint(
    output: Path, source: CheckpointSource, *, layout: SavedLayout = "qscorer", dtype: Precision = "float16"
) -> Path:
    """Write any checkpoint as one folder that loads without a base, and faster.

    Args:
        layout: as for `save_folder`; `published` takes the `tokenizer.model` of the checkpoint.
        dtype: precision of the written weights: `float16` (the published one), `bfloat16` or `float32`.

    Raises:
        CheckpointError, DownloadError: see `load_checkpoint` and `save_folder`.
        ValueError: a `dtype` that cannot be written.
    """
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"dtype must be float16, bfloat16 or float32 to be written, got {dtype!r}")
    folders = source.fetch()
    folder = recognise(*folders)
    stored = sum(shard.stat().st_size for shard in weight_shards(folder.base or folder.path))
    check_output(output, layout, folder.tokenizer_folder, stored * (2 if dtype == "float32" else 1))
    loaded = load_folder(*folders, dtype=dtype)
    return save_folder(output, loaded.model, loaded.tokenizer, layout=layout, tokenizer_source=folder.tokenizer_folder)


def check_output(output: Path, layout: SavedLayout, tokenizer_source: Path | None, size: int = 0) -> None:
    """Raise what `save_folder` would, before a long load: bad layout, output in the way, no tokenizer, too little disk.

    Args:
        size: bytes that are going to be written.
    """
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


def _write_notes(folder: Path, notes: Mapping[str, str]) -> None:
    for name, text in notes.items():
        (folder / name).write_text(text, encoding="utf-8")


def save_lora_folder(
    output: Path,
    model: QScorerForScoring,
    adapters: PeftModel | None,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write the published LoRA layout (layout 1): adapters in float32, other trained parts in bfloat16, no tokenizer.

    Args:
        model: with the adapters inside, not merged.
        adapters: the peft wrapper around it.
        notes: text files to put beside the weights, by name.

    Raises:
        CheckpointError: there are no adapters, `output` is not empty, or the disk is full.
    """
    check_output(output, "qscorer", None)
    if adapters is None:
        raise CheckpointError("layout 'published_lora' needs a run with lora.enabled: true")
    settings = cast("LoraConfig", adapters.peft_config["default"])
    factors: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            factors[f"base_model.model.{name.replace('.default', '')}"] = parameter.detach().float().cpu()
        elif parameter.requires_grad or name.startswith(NOT_IN_BASE):
            others[f"base_model.model.{name}"] = parameter.detach().to(torch.bfloat16).cpu()
    modules = sorted({name.split("base_model.model.")[1].split(".lora_")[0] for name in factors})
    published = {**model.config.to_published(), "score_token_id": [], "score_tokens": []}
    with _new_folder(output) as folder:
        torch.save(factors, folder / ADAPTER_WEIGHTS[1])
        torch.save(others, folder / NON_LORA_WEIGHTS)
        write_json(folder / "config.json", {**published, "torch_dtype": "float16"})
        write_json(
            folder / ADAPTER_CONFIG,
            {
                "base_model_name_or_path": model.config.name_or_path,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
                "lora_alpha": settings.lora_alpha,
                "lora_dropout": settings.lora_dropout,
                "modules_to_save": None,
                "peft_type": "LORA",
                "r": settings.r,
                "target_modules": modules,
                "task_type": "CAUSAL_LM",
            },
        )
        _write_notes(folder, notes)
    return output


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
def _new_folder(output: Path) -> Iterator[Path]:
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
