"""Training and scoring inside pyiqa's own harness, from a pyiqa YAML, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_checkpoint import own_folder
from tiny_training import make_pictures

TRAIN = """
import sys
from pathlib import Path
from pyiqa.train import train_pipeline
import pyiqa.archs
built = []
original = pyiqa.archs.build_network
def counting(opt):
    built.append(opt["type"])
    return original(opt)
import pyiqa.models.general_iqa_model as general
general.build_network = counting
root = sys.argv.pop(1)
result = train_pipeline(root)
assert built == ["QScorer"], built
print("RESULT", result)
"""


@pytest.mark.slow
def test_trains_from_a_pyiqa_yaml(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 12)
    checkpoint = own_folder(tmp_path / "checkpoint")
    dataset = {
        "name": "tiny",
        "type": "GeneralNRDataset",
        "dataroot_target": str(pictures),
        "meta_info_file": str(pictures / "labels.csv"),
        "mos_range": [0, 100],
        "lower_better": False,
        "mos_normalize": True,
    }
    correlation = {"type": "calculate_srcc"}
    options = {
        "name": "tiny",
        "model_type": "QScorerTrainModel",
        "num_gpu": 0,
        "manual_seed": 1,
        "datasets": {
            "train": {
                **dataset,
                "phase": "train",
                "use_shuffle": True,
                "num_worker_per_gpu": 0,
                "batch_size_per_gpu": 4,
                "dataset_enlarge_ratio": 1,
                "prefetch_mode": None,
                "augment": {"random_crop": 56},
            },
            "val": {**dataset, "phase": "val"},
        },
        "network": {"type": "QScorer", "checkpoint": str(checkpoint), "dtype": "float32", "clamp": False},
        "path": {},
        "train": {
            "trained_parts": ["regressor", "lm_head"],
            "optim": {"type": "Adam", "lr": 1e-3},
            "scheduler": {"type": "CosineAnnealingLR", "T_max": 10},
            "total_iter": 6,
            "mos_loss_opt": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "val": {"val_freq": 3, "save_img": False, "key_metric": "srcc", "metrics": {"srcc": correlation}},
        "logger": {"print_freq": 3, "save_latest_freq": 3, "save_checkpoint_freq": 6, "use_tb_logger": False},
    }
    config = tmp_path / "tiny.yml"
    config.write_text(yaml.safe_dump(options))
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path), "-opt", str(config)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "RESULT" in done.stdout
    saved = torch.load(next((tmp_path / "experiments").rglob("net_latest.pth")), weights_only=True)["params"]
    assert saved
    assert all("deepmlp" in name or "lm_head" in name for name in saved), sorted(saved)
    assert list((tmp_path / "experiments").rglob("net_best*.pth"))
    assert not list((tmp_path / "experiments").rglob("*.unfinished"))
