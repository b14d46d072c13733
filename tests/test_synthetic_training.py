"""Training on rendered data with a pretrained feature network, as the recipe of qscorer-mini does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from test_features import ARCHITECTURE, BACKBONE
from test_training_run import run

from pyiqa_qscorer.errors import SyntheticDataError, TrainingDataError
from pyiqa_qscorer.synthetic.render import CALIBRATION_FILE
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import train

PHOTOS = Path(__file__).with_name("photos")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos to train and to validate on, a calibration, and weights of a feature network."""
    folder = tmp_path_factory.mktemp("world")
    for place, names in (("training", ("cat", "coffee")), ("validation", ("astronaut",))):
        (folder / place).mkdir()
        for name in names:
            Image.open(PHOTOS / f"{name}.jpg").convert("RGB").resize((96, 72)).save(folder / place / f"{name}.png")
    (folder / "rendered").mkdir()
    fitted = {"weights": [1.1, 0.3], "bias": -4.0, "fit": {}}
    (folder / "rendered" / CALIBRATION_FILE).write_text(json.dumps(fitted))
    torch.manual_seed(3)
    torch.save(timm.create_model(BACKBONE).state_dict(), folder / "backbone.pth")
    return folder


def recipe(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    model = {"architecture": ARCHITECTURE, "backbone_weights": str(world / "backbone.pth"), "prompts": ["score"]}
    data = {
        "photos": str(world),
        "rendered": str(world / "rendered"),
        "train": [
            {"synthetic": "chains", "photos": ["training"], "count": 6, "seed": 1},
            {"synthetic": "kadid", "photos": ["training"], "count": 6, "seed": 2, "weight": 0.5},
        ],
        "validation": [
            {"synthetic": "chains", "photos": ["validation"], "count": 4, "seed": 3},
            {"synthetic": "kadid", "photos": ["validation"], "count": 4, "seed": 4},
        ],
        "flip": True,
        "workers": 0,
        "render_workers": 2,
    }
    optimisation = {
        "epochs": 2,
        "batch_size": 3,
        "learning_rate": 2e-3,
        "vision_backbone_learning_rate": 2e-4,
        "precision": "float32",
        "log_steps": 1,
        "save_steps": 2,
    }
    return {
        "output": str(output),
        "model": {**model, "gradient_checkpointing": False},
        "data": {**data, **changes},
        "lora": {"enabled": False},
        "trainable": {"everything": True},
        "optimisation": optimisation,
        "device": "cpu",
    }


def test_photos_of_training_and_validation_must_differ(world: Path, tmp_path: Path) -> None:
    part = {"synthetic": "kadid", "photos": ["training"], "count": 4, "seed": 9}
    with pytest.raises(TrainingDataError, match=r"2 images are in both .*other photos"):
        train(parse_config(recipe(world, tmp_path / "out", validation=[part])))
    missing = {**part, "photos": ["nowhere"]}
    with pytest.raises(SyntheticDataError, match="nowhere is not a folder with images"):
        train(parse_config(recipe(world, tmp_path / "other", validation=[missing])))


@pytest.mark.slow
def test_killed_recipe_goes_on_to_the_same_result(world: Path, tmp_path: Path) -> None:
    status, whole = run(recipe(world, tmp_path / "whole"), tmp_path / "a")
    assert status == 0, whole
    facts = json.loads((tmp_path / "whole" / "checkpoint_qscorer" / "training.json").read_text())
    assert [part["dataset"] for part in facts["data"]["train"]] == ["chains of training", "kadid of training"]
    assert facts["steps"] == 6  # of (6 + 3) / 3 for each epoch
    assert {"srcc_0_chains of validation", "srcc_1_kadid of validation"} <= {
        name.removeprefix("validation_") for name in facts["metrics"]
    }
    assert {"libavif", "av", "opencv", "timm"} <= facts["versions"].keys()
    content = recipe(world, tmp_path / "killed")
    status, _ = run(content, tmp_path / "b", KILL_AT_STEP="5")
    assert status == -9
    status, resumed = run(content, tmp_path / "b")
    assert status == 0, resumed
    assert resumed["losses"] == whole["losses"]
    same = ("validation_srcc", "validation_rmse", "validation_srcc_1_kadid of validation")
    assert [resumed["metrics"][name] for name in same] == [whole["metrics"][name] for name in same]
