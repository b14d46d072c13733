"""A training run small enough for tests: synthetic pictures whose quality is how sharp they are."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

PART = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
ARCHITECTURE = {
    **PART,
    "initializer_range": 0.15,
    "regressor_hidden_sizes": [16],
    "vision_config": {**PART, "image_size": 56, "patch_size": 14},
    "abstractor_config": {**PART, "num_learnable_queries": 4, "grid_size": 4},
}


def make_pictures(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """Write `count` PNGs and `labels.csv` (file, MOS on 0..100, std, split); the blurrier, the lower the MOS."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        sharpness = index / (count - 1)
        noise = Image.fromarray(random.integers(0, 256, (64, 80, 3), dtype=np.uint8))
        noise.filter(ImageFilter.GaussianBlur(4 * (1 - sharpness))).save(folder / f"{index:02d}.png")
        split = "val" if index % 4 == 3 else "train"
        rows.append([f"{index:02d}.png", f"{5 + 90 * sharpness:.3f}", "8.0", split])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "mos", "std", "split"], *rows])
    return folder


def settings(pictures: Path, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration as parsed from YAML; `sections` go over its sections key by key."""
    data = {"folder": str(pictures), "csv": str(pictures / "labels.csv"), "mos_range": [0, 100]}
    data |= {"std_column": "std", "split_column": "split"}
    content: dict[str, Any] = {
        "output": str(output),
        "model": {"architecture": ARCHITECTURE, "gradient_checkpointing": False},
        "data": {"train": [data], "validation": [data]},
        "objective": {"scale": 1.0, "clamp_score": False},
        "lora": {"enabled": False},
        "trainable": {"everything": True},
        "training": {
            **{"num_train_epochs": 4, "per_device_train_batch_size": 6, "learning_rate": 2e-3, "bf16": False},
            **{"logging_steps": 1, "dataloader_num_workers": 0, "use_cpu": True},
        },
    }
    for name, changes in sections.items():
        content[name] = {**content[name], **changes} if isinstance(changes, dict) else changes
    return content
