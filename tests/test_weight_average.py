"""Averaged weights: the formula, what the model has when, and a run that evaluates and keeps them, also resumed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import make_pictures, settings
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from pyiqa_qscorer.errors import TrainingConfigError
from pyiqa_qscorer.training.average import AVERAGED_WEIGHTS, WeightAverage
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import train
from pyiqa_qscorer.training.trainer import TRAINED_WEIGHTS, last_complete_state


def follow(average: WeightAverage, model: nn.Linear, values: list[float], tmp_path: Path) -> None:
    """Tell `average` of one step after another, after each of which all weights of the model have the value."""
    events: Any = (TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl())
    for step, value in enumerate(values, start=1):
        nn.init.constant_(model.weight, value)
        events[1].global_step = step
        average.on_step_end(*events)


def test_the_formula(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    nn.init.constant_(model.weight, 5.0)
    average, random = WeightAverage(model, 0.5), torch.Generator().manual_seed(0)
    values = torch.rand(30, generator=random).tolist()
    follow(average, model, values, tmp_path)
    expected = 5.0
    for step, value in enumerate(values, start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert average.values.keys() == {"weight"}  # what is frozen is not copied
    torch.testing.assert_close(average.values["weight"], torch.full((3, 2), expected))


def test_the_model_has_them_inside_only_and_what_was_saved_goes_on_alike(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    average = WeightAverage(model, 0.9)
    follow(average, model, [1.0, 2.0, 3.0], tmp_path)
    averaged = average.values["weight"].clone()
    with pytest.raises(RuntimeError, match="evaluation failed"), average.applied():
        torch.testing.assert_close(model.weight.data, averaged)
        raise RuntimeError("evaluation failed")
    torch.testing.assert_close(model.weight.data, torch.full((3, 2), 3.0))
    average.apply()
    torch.testing.assert_close(model.weight.data, averaged)
    model = nn.Linear(2, 3)
    average = WeightAverage(model, 0.9)
    follow(average, model, [1.0, 2.0], tmp_path)
    average.save(tmp_path)
    resumed = WeightAverage(model, 0.9)
    resumed.load(tmp_path)
    for one in (average, resumed):
        follow(one, model, [4.0], tmp_path)
    torch.testing.assert_close(resumed.values, average.values, rtol=0, atol=0)


def test_a_run_evaluates_and_keeps_the_average_and_resumes_it(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    training = {"num_train_epochs": 3, "average_decay": 0.8, "save_total_limit": 9}
    config, out = parse_config(settings(pictures, tmp_path / "out", training=training)), tmp_path / "out"
    whole = train(config)
    kept = whole.folders["qscorer"]
    best = min(out.glob("checkpoint-*"), key=lambda path: _difference(load_file(path / AVERAGED_WEIGHTS), kept))
    assert _difference(load_file(best / AVERAGED_WEIGHTS), kept) == 0
    assert _difference(load_file(best / TRAINED_WEIGHTS), kept) > 1e-4
    # As if the process had been killed in the last epoch.
    weights = load_file(whole.folders["qscorer"] / "model.safetensors")
    last = last_complete_state(out)
    assert last is not None
    shutil.rmtree(last)
    shutil.rmtree(whole.folders["qscorer"])
    again = train(config)
    assert again.metrics["validation_rmse"] == whole.metrics["validation_rmse"]
    torch.testing.assert_close(load_file(again.folders["qscorer"] / "model.safetensors"), weights, rtol=0, atol=0)


def test_without_validation_the_last_average_is_kept_and_split_parameters_are_refused(tmp_path: Path) -> None:
    pictures, training = make_pictures(tmp_path / "pictures"), {"num_train_epochs": 1, "average_decay": 0.8}
    content = settings(pictures, tmp_path / "out", training=training)
    content["data"]["validation"] = []
    result, state = train(parse_config(content)), last_complete_state(tmp_path / "out")
    assert state is not None
    assert _difference(load_file(state / AVERAGED_WEIGHTS), result.folders["qscorer"]) == 0
    with pytest.raises(TrainingConfigError, match="average_decay needs whole parameters"):
        parse_config({**content, "training": {**training, "fsdp": "full_shard"}})


def _difference(values: dict[str, torch.Tensor], folder: Path) -> float:
    """Largest difference between trained parameters and those of a checkpoint."""
    stored = load_file(folder / "model.safetensors")
    return max(float((value - stored[name]).abs().max()) for name, value in values.items())
