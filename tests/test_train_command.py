"""`pyiqa-qscorer train`: a run, its messages, and mistakes in the configuration."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny_training import make_pictures, settings
from typer.testing import CliRunner

from pyiqa_qscorer.cli.app import app
from pyiqa_qscorer.training.config import TrainConfig
from pyiqa_qscorer.training.dataset_config import PyiqaDataset


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(make_pictures(tmp_path / "pictures"), tmp_path / "out")))
    return path


def test_trains_and_names_what_it_wrote(config: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(config), "--set", "training.num_train_epochs=1"])
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out" / "checkpoint_qscorer") in result.output.replace("\n", "")
    assert "Validation: SRCC" in result.output
    again = CliRunner().invoke(app, ["train", str(config), "--set", "training.num_train_epochs=1", "--no-resume"])
    assert again.exit_code == 2 and "resume it, or use a new folder" in " ".join(again.output.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny.yaml", "--set", "training.epoch=1"], "epoch: unknown key; did you mean 'num_train_epochs'?"),
        (["tiny.yaml", "--set", "training.seed"], "--set takes KEY=VALUE"),
        (["tiny.yaml", "--set", "data.on_error=maybe"], "data.on_error"),
        (
            ["tiny.yaml", "--set", "model.levels=[5"],
            "--set model.levels: [5 is not YAML: while parsing a flow sequence",
        ),
        (["tiny.yaml", "--set", "data.train.0.csv=gone.csv"], "gone.csv cannot be read"),
        (["folder/none.yaml"], "configuration folder/none.yaml cannot be read: there is no such file"),
        (
            ["nope.yaml"],
            "nope.yaml cannot be read: there is no such file; examples: backbone.yaml, finetune_mini.yaml, koniq.yaml",
        ),
        (["finetune_mini.yaml"], "labels.csv cannot be read"),
        (["--no-resume"], "name a configuration file; pyiqa-qscorer train --examples lists those of this package"),
    ],
)
def test_mistakes_end_with_one_message_and_leave_nothing(config, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(config.parent)
    before, result = sorted(config.parent.iterdir()), CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 2 and words in " ".join(result.output.split())
    assert "Traceback" not in result.output and sorted(config.parent.iterdir()) == before
    result = CliRunner().invoke(app, ["train", "tiny.yaml", "--set", "model.levels=0", "--set", "lora.r=0"])
    assert "\n  model.levels:" in result.output and "\n  lora.r:" in result.output and "\\n" not in result.output


def test_data_root_and_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[TrainConfig] = []
    stopped = SimpleNamespace(finished=False)
    monkeypatch.setattr("pyiqa_qscorer.training.run.train", lambda config, **_: given.append(config) or stopped)
    result = CliRunner().invoke(app, ["train", "koniq.yaml", "--data-root", "/data/iqa"])
    assert result.exit_code == 130, result.output
    parts = [*given[0].data.train, *given[0].data.validation]
    assert [part.data_root for part in parts if isinstance(part, PyiqaDataset)] == [Path("/data/iqa")] * 2
    listed = CliRunner().invoke(app, ["train", "--examples"])
    assert listed.exit_code == 0 and "finetune_mini.yaml: The small model on your own labels" in listed.output
    copied = CliRunner().invoke(app, ["train", "--examples", str(tmp_path / "mine")])
    paths = [Path(line) for line in copied.stdout.splitlines()]
    assert {path.name for path in paths} >= {"koniq.yaml", "README.md"}
    assert {path.parent for path in paths} == {tmp_path / "mine"}
    again = CliRunner().invoke(app, ["train", "--examples", str(tmp_path / "mine")])
    assert again.exit_code == 2 and "exists" in again.output


@pytest.mark.slow
def test_the_small_model_learns_from_own_labels(tmp_path: Path) -> None:
    make_pictures(tmp_path / "images", 16)
    changes = [f"data.{part}.0.{key}" for part in ("train", "validation") for key in ("csv", "folder", "mos_range")]
    values = [str(tmp_path / "images" / "labels.csv"), str(tmp_path / "images"), "[0, 100]"] * 2
    given = [f"{key}={value}" for key, value in zip(changes, values, strict=True)]
    given += ["training.num_train_epochs=2", f"output={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "pyiqa_qscorer.cli", "train", "finetune_mini.yaml"]
    command += [part for one in given for part in ("--set", one)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "Validation: SRCC" in done.stderr
    assert "arning" not in done.stderr and "Loading weights" not in done.stderr
