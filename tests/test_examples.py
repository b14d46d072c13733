"""The scripts of `examples/`, each run as a person would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from environments import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
CLEAN = ("astronaut.jpg", "cat.jpg", "coffee.jpg")


def run(name: str, *arguments: str) -> str:
    """Standard output of an example, which must succeed without the network."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_short_and_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for example in EXAMPLES.glob("*.py"):
        assert f'run("{example.name}"' in source, f"{example.name} has no test here"
        assert len(example.read_text(encoding="utf-8").splitlines()) <= 40, f"{example.name} is longer than 40 lines"


def test_quick_examples(tmp_path: Path) -> None:
    lines = [line.split() for line in run("score_a_folder.py").splitlines()]
    assert {name for _, name in lines[:3]} == set(CLEAN)  # the undistorted photos come first
    assert len(lines) == 9
    assert "one hot" in run("error_analysis.py", str(tmp_path))
    assert (tmp_path / "report" / "errors.html").stat().st_size > 0


@pytest.mark.slow
def test_leaderboard(tmp_path: Path) -> None:
    output = run("leaderboard.py", str(tmp_path))
    assert "qscorer-mini" in output and "piqe" in output
    assert (tmp_path / "report" / "report.html").stat().st_size > 0


@pytest.mark.slow
def test_loss_in_a_training_loop() -> None:
    lines = run("loss_in_a_training_loop.py").splitlines()
    errors = [float(line.split()[3].rstrip(",")) for line in lines]
    assert len(errors) == 10 and errors[-1] < errors[0]


@pytest.mark.slow
def test_train_on_a_csv(tmp_path: Path) -> None:
    output = run("train_on_a_csv.py", str(tmp_path))
    assert "Scores of the blurred cat" in output
    assert (tmp_path / "run" / "checkpoint_qscorer" / "model.safetensors").exists()
