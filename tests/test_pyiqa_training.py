"""Training inside pyiqa's own harness, from a pyiqa YAML, in processes of their own: the model, and with the loss."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_checkpoint import own_folder
from tiny_training import make_pictures

DATASET = {"name": "tiny", "type": "GeneralNRDataset", "mos_range": [0, 100], "lower_better": False}
LOADER = {"use_shuffle": True, "num_worker_per_gpu": 0, "batch_size_per_gpu": 4, "prefetch_mode": None}
LOADER |= {"dataset_enlarge_ratio": 1, "augment": {"random_crop": 56}}
LOGGER = {"print_freq": 1, "save_latest_freq": 3, "save_checkpoint_freq": 6, "use_tb_logger": False}


def train_in_pyiqa(script: str, folder: Path, settings: dict[str, Any]) -> str:
    """Output of `script`, which calls `train_pipeline(sys.argv.pop(1))`, for six steps.

    Args:
        folder: gets the pictures, the YAML file, and what pyiqa writes (`experiments`).
        settings: sections of the YAML file; those of `train` go over the optimiser, the others over what is here.
    """
    pictures = make_pictures(folder / "pictures", 12)
    files = {"dataroot_target": str(pictures), "meta_info_file": str(pictures / "labels.csv")}
    dataset = {**DATASET, **files, "mos_normalize": True}
    schedule = {"scheduler": {"type": "CosineAnnealingLR", "T_max": 10}, "total_iter": 6}
    options = {
        **{"name": "tiny", "num_gpu": 0, "manual_seed": 1, "path": {}, "logger": LOGGER},
        "datasets": {"train": {**dataset, **LOADER, "phase": "train"}, "val": {**dataset, "phase": "val"}},
        **settings,
        "train": {"optim": {"type": "Adam", "lr": 1e-3}, **schedule, **settings["train"]},
    }
    config = folder / "tiny.yml"
    config.write_text(yaml.safe_dump(options))
    command = [sys.executable, "-c", script, str(folder), "-opt", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


MODEL = """
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
    checkpoint = own_folder(tmp_path / "checkpoint")
    settings = {
        "model_type": "QScorerTrainModel",
        "network": {"type": "QScorer", "checkpoint": str(checkpoint), "dtype": "float32", "clamp": False},
        "train": {"trained_parts": ["regressor", "lm_head"], "mos_loss_opt": {"type": "L1Loss", "loss_weight": 1.0}},
        "val": {
            "val_freq": 3,
            "save_img": False,
            "key_metric": "srcc",
            "metrics": {"srcc": {"type": "calculate_srcc"}},
        },
    }
    assert "RESULT" in train_in_pyiqa(MODEL, tmp_path, settings)
    saved = torch.load(next((tmp_path / "experiments").rglob("net_latest.pth")), weights_only=True)["params"]
    assert saved
    assert all("deepmlp" in name or "lm_head" in name for name in saved), sorted(saved)
    assert list((tmp_path / "experiments").rglob("net_best*.pth"))
    assert not list((tmp_path / "experiments").rglob("*.unfinished"))


RESTORER = """
import sys
import torch
from pyiqa.train import train_pipeline
from pyiqa.utils.registry import ARCH_REGISTRY
@ARCH_REGISTRY.register()
class SmallRestorer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
    def forward(self, images):
        return images + self.layer(images)
train_pipeline(sys.argv.pop(1))
"""


@pytest.mark.slow
def test_trains_a_restorer_from_a_pyiqa_yaml(own: Path, tmp_path: Path) -> None:
    """pyiqa's own general model; images of one quality label, of which the loss takes no notice."""
    loss = {"type": "QScorerLoss", "checkpoint": str(own), "clamp": False, "loss_weight": 0.1, "target": 5}
    settings = {
        "model_type": "GeneralIQAModel",
        "network": {"type": "SmallRestorer"},
        "train": {"mos_loss_opt": {**loss, "gradient_checkpointing": True}},
        "val": {"val_freq": 100, "save_img": False, "metrics": {}},
    }
    said = train_in_pyiqa(RESTORER, tmp_path, settings)
    assert "Loss [QScorerLoss] is created" in said
    losses = [float(value) for value in re.findall(r"l_mos: (\S+)", said)]
    assert len(losses) == 6 and all(math.isfinite(value) for value in losses)
    saved = torch.load(next((tmp_path / "experiments").rglob("net_latest.pth")), weights_only=True)["params"]
    assert set(saved) == {"layer.weight", "layer.bias"}
    assert all(parameter.abs().min() > 0 for parameter in saved.values())
