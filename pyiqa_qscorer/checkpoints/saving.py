"""Writing checkpoints: layout 3 (ours) and layout 2 (what the published merge script writes)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ..errors import CheckpointError
from ..model import QScorerForScoring
from ..preprocessing import MEAN, STD

SavedLayout = Literal["qscorer", "published"]


def save_folder(
    output: Path,
    model: QScorerForScoring,
    tokenizer: PreTrainedTokenizerBase,
    *,
    layout: SavedLayout = "qscorer",
    tokenizer_source: Path | None = None,
) -> Path:
    """Write a checkpoint that loads by itself.

    The files go to a temporary folder beside `output`, which is renamed when all are complete.

    Args:
        layout: `qscorer` (ours) or `published` (the merged layout that the published code reads; it needs LLaMA's
            `tokenizer.model`, taken from `tokenizer_source`).

    Raises:
        CheckpointError: `output` exists and is not an empty folder, the disk is full, or the tokenizer file is missing.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"output must be a new or empty folder, got {output}")
    if layout not in ("qscorer", "published"):
        raise ValueError(f"layout must be 'qscorer' or 'published', got {layout!r}")
    source = None if tokenizer_source is None else tokenizer_source / "tokenizer.model"
    if layout == "published" and (source is None or not source.exists()):
        raise CheckpointError(
            f"layout 'published' needs the original tokenizer.model, not found in {tokenizer_source}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        model.save_pretrained(unfinished)
        if layout == "qscorer":
            tokenizer.save_pretrained(unfinished)
        else:
            _write_json(unfinished / "config.json", {**model.config.to_published(), "torch_dtype": _dtype(model)})
            _save_published_tokenizer(unfinished, model.config.score_tokens, model.config.score_token_ids, source)
        _write_json(unfinished / "preprocessor_config.json", image_settings(model.config.vision_config.image_size))
        unfinished.chmod(0o777 & ~_umask())
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    except OSError as error:
        raise CheckpointError(f"could not write {output}: {error}; nothing was left behind") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return output


def image_settings(image_size: int) -> dict[str, Any]:
    """`preprocessor_config.json` as the published checkpoints have it."""
    return {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
    }


def _save_published_tokenizer(folder: Path, names: list[str], ids: list[int], source: Path | None) -> None:
    """Files of the slow LLaMA tokenizer, with the score tokens, that transformers 4.36 reads."""
    assert source is not None  # checked before anything was written
    shutil.copyfile(source, folder / "tokenizer.model")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    listed = dict(enumerate(special.values())) | dict(zip(ids, names, strict=True))
    _write_json(folder / "added_tokens.json", dict(zip(names, ids, strict=True)))
    _write_json(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": [{"content": name, **plain} for name in names],
            **{role: {"content": token, **plain} for role, token in special.items()},
            "pad_token": {"content": "<unk>", **plain},
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(index): {"content": token, **plain, "special": True} for index, token in listed.items()
            },
            "additional_special_tokens": names,
            **special,
            "pad_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 2048,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer",
            "use_default_system_prompt": False,
        },
    )


def _dtype(model: QScorerForScoring) -> str:
    return str(model.lm_head.weight.dtype).removeprefix("torch.")


def _umask() -> int:
    """The process umask; mkdtemp ignores it and makes folders that only the owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
