"""Training and scoring inside pyiqa's own harness, from a pyiqa YAML, in a process of its own."""

from pathlib import Path

import pytest
import torch
from pyiqa_training import train_in_pyiqa
from tiny_checkpoint import own_folder

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
    done = train_in_pyiqa(TRAIN, tmp_path, settings)
    assert done.returncode == 0, done.stderr
    assert "RESULT" in done.stdout
    saved = torch.load(next((tmp_path / "experiments").rglob("net_latest.pth")), weights_only=True)["params"]
    assert saved
    assert all("deepmlp" in name or "lm_head" in name for name in saved), sorted(saved)
    assert list((tmp_path / "experiments").rglob("net_best*.pth"))
    assert not list((tmp_path / "experiments").rglob("*.unfinished"))
