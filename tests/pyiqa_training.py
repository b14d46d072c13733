"""A few steps of pyiqa's own training pipeline on small pictures, from a YAML file, in a process of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from tiny_training import make_pictures

DATASET = {"name": "tiny", "type": "GeneralNRDataset", "mos_range": [0, 100], "lower_better": False}
LOADER = {
    "use_shuffle": True,
    "num_worker_per_gpu": 0,
    "batch_size_per_gpu": 4,
    "dataset_enlarge_ratio": 1,
    "prefetch_mode": None,
}


def train_in_pyiqa(script: str, folder: Path, settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run `script`, which calls `train_pipeline(sys.argv.pop(1))`, for six steps.

    Args:
        folder: gets the pictures, the YAML file, and what pyiqa writes (`experiments`).
        settings: sections of the YAML file; those of `train` go over the optimiser, the others over what is here.
    """
    pictures = make_pictures(folder / "pictures", 12)
    files = {"dataroot_target": str(pictures), "meta_info_file": str(pictures / "labels.csv")}
    dataset = {**DATASET, **files, "mos_normalize": True}
    options = {
        "name": "tiny",
        "num_gpu": 0,
        "manual_seed": 1,
        "datasets": {
            "train": {
                **dataset,
                **LOADER,
                "phase": "train",
                "dataset_enlarge_ratio": 1,
                "augment": {"random_crop": 56},
            },
            "val": {**dataset, "phase": "val"},
        },
        "path": {},
        "logger": {"print_freq": 1, "save_latest_freq": 3, "save_checkpoint_freq": 6, "use_tb_logger": False},
        **settings,
        "train": {
            "optim": {"type": "Adam", "lr": 1e-3},
            "scheduler": {"type": "CosineAnnealingLR", "T_max": 10},
            "total_iter": 6,
            **settings["train"],
        },
    }
    config = folder / "tiny.yml"
    config.write_text(yaml.safe_dump(options))
    return subprocess.run(
        [sys.executable, "-c", script, str(folder), "-opt", str(config)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
    )
