"""Settings of older versions, and what they are called now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import TrainingConfigError

_OF_TRANSFORMERS = {
    **{"epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size", "schedule": "lr_scheduler_type"},
    **{"gradient_accumulation": "gradient_accumulation_steps", "warmup": "warmup_steps", "keep": "save_total_limit"},
    **{"max_gradient_norm": "max_grad_norm", "log_steps": "logging_steps", "best_by": "metric_for_best_model"},
    **{"fsdp_settings": "fsdp_config", "precision": "bf16 or training.fp16 (float32: bf16: false)"},
    **dict.fromkeys(("max_steps", "learning_rate", "vision_backbone_learning_rate", "weight_decay", "seed")),
    **dict.fromkeys(("average_decay", "save_steps", "deepspeed", "fsdp")),
}
_RENDERED = "is left to pyiqa-qscorer render RECIPE.yaml: run that first, and give the csv that it writes"
RENAMED = {
    "optimisation": "is the section training now, with the names of transformers' TrainingArguments",
    **{f"optimisation.{old}": f"is training.{new or old} now" for old, new in _OF_TRANSFORMERS.items()},
    **{f"lora.{old}": f"is lora.{new} now" for old, new in (("alpha", "lora_alpha"), ("dropout", "lora_dropout"))},
    "lora.targets": "is lora.target_modules now",
    "device": "is training.use_cpu: true now",
    "data.workers": "is training.dataloader_num_workers now",
    **{f"data.{key}": _RENDERED for key in ("photos", "rendered", "render_workers")},
    **{f"data.{phase}.synthetic": _RENDERED for phase in ("train", "validation")},
}
"""Old spellings, and what to write instead."""


def refuse_old_spellings(content: Mapping[str, Any], source: str) -> None:
    """Raise `TrainingConfigError` that says what to write instead of each old setting."""
    found = [f"  {key} {RENAMED[key]}" for key in dict.fromkeys(_keys(content)) if key in RENAMED]
    if found:
        raise TrainingConfigError(f"{source} has settings of an older version:\n" + "\n".join(found))


def _keys(content: Any, place: str = "") -> Iterator[str]:
    """Dotted keys of all settings; positions in lists do not count."""
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, Mapping):
            for key, value in part.items():
                yield f"{place}{key}"
                yield from _keys(value, f"{place}{key}.")
