"""`pyiqa-qscorer train`: a run, its messages, and mistakes in the configuration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny_training import make_pictures, settings
from typer.testing import CliRunner

from pyiqa_qscorer.cli.app import app
from pyiqa_qscorer.training.config import TrainConfig


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(make_pictures(tmp_path / "pictures"), tmp_path / "out")))
    return path


def test_trains_and_names_what_it_wrote(config: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(config), "--set", "optimisation.epochs=1"])
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out" / "checkpoint_qscorer") in result.output.replace("\n", "")
    assert "Validation: SRCC" in result.output
    again = CliRunner().invoke(app, ["train", str(config), "--set", "optimisation.epochs=1", "--no-resume"])
    assert again.exit_code == 2
    assert "resume it, or use a new folder" in " ".join(again.output.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "optimisation.epoch=1"], "optimisation.epoch: unknown key; did you mean 'epochs'?"),
        (["--set", "optimisation.epochs"], "--set takes KEY=VALUE"),
        (["--set", "data.on_error=maybe"], "data.on_error"),
        (["--set", "model.levels=[5"], "--set model.levels: [5 is not YAML: while parsing a flow sequence"),
    ],
)
def test_mistakes_end_with_one_message(config: Path, arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["train", str(config), *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_data_root_is_that_of_every_named_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[TrainConfig] = []
    stopped = SimpleNamespace(finished=False)
    monkeypatch.setattr("pyiqa_qscorer.training.run.train", lambda config, **_: given.append(config) or stopped)
    result = CliRunner().invoke(app, ["train", "koniq.yaml", "--data-root", "/data/iqa"])
    assert result.exit_code == 130, result.output
    parts = [*given[0].data.train, *given[0].data.validation]
    assert [part.data_root for part in parts if part.dataset] == [Path("/data/iqa")] * 2


def test_missing_configuration_is_named() -> None:
    result = CliRunner().invoke(app, ["train", "folder/none.yaml"])
    assert result.exit_code == 2
    assert "folder/none.yaml cannot be read" in " ".join(result.output.split())
