"""Training on rendered data with a pretrained feature network, as the recipe of qscorer-mini does it."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from test_features import ARCHITECTURE, BACKBONE
from train_in_subprocess import run, run_here

from pyiqa_qscorer.synthetic.recipe import Recipe
from pyiqa_qscorer.synthetic.rendering import CALIBRATION_FILE, find_photos, render

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


def recipe(world: Path, output: Path) -> dict[str, Any]:
    model = {"architecture": ARCHITECTURE, "backbone_weights": [str(world / "backbone.pth")], "prompts": ["score"]}
    sets = {
        "train": {"chains": {"count": 6, "seed": 1}, "kadid": {"count": 6, "seed": 2}},
        "validation": {"chains": {"count": 4, "seed": 3}, "kadid": {"count": 4, "seed": 4}},
    }
    data: dict[str, Any] = {"flip": True}
    for phase, parts in sets.items():
        photos = [world / ("training" if phase == "train" else phase)]
        data[phase] = []
        for kind, fields in parts.items():
            folder = world / "rendered" / phase / kind
            table = render(
                Recipe(kind=kind, **fields), find_photos(photos), folder, world / "rendered" / CALIBRATION_FILE
            )
            data[phase].append({"name": kind, "csv": str(table), "std_column": "std", "mos_range": [1, 5]})
    data["train"][1]["weight"] = 0.5
    return {
        "output": str(output),
        "model": {**model, "gradient_checkpointing": False},
        "data": data,
        "lora": {"enabled": False},
        "trainable": {"everything": True},
        "training": {
            **{"num_train_epochs": 2, "per_device_train_batch_size": 3, "learning_rate": 2e-3},
            **{"vision_backbone_learning_rate": 2e-4, "bf16": False, "logging_steps": 1, "save_steps": 2},
            **{"use_cpu": True, "dataloader_num_workers": 0},
        },
    }


@pytest.mark.slow
@pytest.mark.usefixtures("rendering_here")
def test_killed_recipe_goes_on_to_the_same_result(world: Path, tmp_path: Path) -> None:
    whole = run_here(recipe(world, tmp_path / "whole"))
    facts = json.loads((tmp_path / "whole" / "checkpoint_qscorer" / "training.json").read_text())
    assert [part["dataset"] for part in facts["data"]["train"]] == ["chains", "kadid"]
    assert facts["steps"] == 6  # of (6 + 3) / 3 for each epoch
    assert {"srcc_0_chains", "srcc_1_kadid"} <= {name.removeprefix("validation_") for name in facts["metrics"]}
    content = recipe(world, tmp_path / "killed")
    assert run(content, tmp_path, KILL_AT_STEP="5")[0] == -9
    resumed = run_here(content)
    assert resumed["losses"] == whole["losses"]
    same = ("validation_srcc", "validation_rmse", "validation_srcc_1_kadid")
    assert [resumed["metrics"][name] for name in same] == [whole["metrics"][name] for name in same]
