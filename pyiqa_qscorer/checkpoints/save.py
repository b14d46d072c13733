"""Writing checkpoints in any of the three layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import CheckpointError
from ..files import write_json
from ..model import QScorerForScoring
from ..model.vlm import VlmQScorer
from .layouts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, NON_LORA_WEIGHTS, recognise, weight_shards
from .load import Precision, load_folder
from .new_folder import SavedLayout, check_output, new_folder, write_notes
from .published_layout import image_settings, save_published_tokenizer
from .source import CheckpointSource
from .vlm_checkpoint import save_vlm_folder

if TYPE_CHECKING:  # peft takes seconds to import, and scoring does not need it
    from peft import LoraConfig, PeftModel

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
    """Write a checkpoint that loads by itself; it appears in `output` when all of its files are complete.

    Args:
        layout: `qscorer` (ours) or `published` (the merged layout that the published code reads; it needs LLaMA's
            `tokenizer.model`, taken from `tokenizer_source`).
        notes: text files to put beside the weights, by name.

    Raises:
        CheckpointError: `output` exists and is not an empty folder, the disk is full, or the tokenizer file is missing.
    """
    check_output(output, layout, tokenizer_source)
    source = None if tokenizer_source is None else tokenizer_source / "tokenizer.model"
    with new_folder(output) as folder:
        # Small shards, because a loader's mapped pages add up to one shard.
        model.save_pretrained(folder, max_shard_size="1GB")
        if layout == "qscorer":
            tokenizer.save_pretrained(folder)
        else:
            dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
            write_json(folder / "config.json", {**model.config.to_published(), "torch_dtype": dtype})
            save_published_tokenizer(folder, model.config.score_tokens, model.config.score_token_ids, source)
        write_json(folder / "preprocessor_config.json", image_settings(model.config.vision_config.image_size))
        write_notes(folder, notes)
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
    if folder.is_vlm and layout != "qscorer":
        raise ValueError(f"layout must be qscorer for a checkpoint on another backbone, got {layout!r}")
    stored = sum(shard.stat().st_size for shard in weight_shards(folder.base or folder.path))
    check_output(output, layout, folder.tokenizer_folder, stored * (2 if dtype == "float32" else 1))
    loaded = load_folder(*folders, dtype=dtype)
    if isinstance(loaded.model, VlmQScorer):
        return save_vlm_folder(output, loaded.model)
    return save_folder(output, loaded.model, loaded.tokenizer, layout=layout, tokenizer_source=folder.tokenizer_folder)


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
        notes: see `save_folder`.

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
    with new_folder(output) as folder:
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
        write_notes(folder, notes)
    return output
