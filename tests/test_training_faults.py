"""What a training does where its folder is shared, its best state is gone, or the disk is full."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_training_run import PROGRAM, run
from tiny_training import make_pictures, settings

from pyiqa_qscorer.errors import TrainingFailedError
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import train
from pyiqa_qscorer.training.trainer import last_complete_state


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def test_a_second_training_in_the_same_folder_is_refused_and_the_first_ends_well(
    pictures: Path, tmp_path: Path
) -> None:
    content = settings(pictures, tmp_path / "out", training={"num_train_epochs": 3})
    (tmp_path / "config.json").write_text(json.dumps(content))
    first = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(tmp_path / "config.json"), str(tmp_path / "losses.json")],
        env={**os.environ, "PAUSE_AT_STEP": "4"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    try:
        status, second = run(content, tmp_path / "second")
        assert status != 0
        assert "another process trains into" in second["stderr"]
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(120) == 0, first.stderr and first.stderr.read()
    facts = json.loads((tmp_path / "out" / "checkpoint_qscorer" / "training.json").read_text())
    assert facts["best_state"] is not None and facts["steps"] == 9


@pytest.fixture
def stopped(pictures: Path, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A configuration whose run was stopped in its third epoch, and the best state so far."""
    content = settings(pictures, tmp_path / "out", training={"num_train_epochs": 3, "save_total_limit": 3})
    status, result = run(content, tmp_path, STOP_AT_STEP="8")
    assert status == 0 and not result["finished"]
    newest = last_complete_state(tmp_path / "out")
    assert newest is not None and newest.name == "checkpoint-8"
    best = json.loads((newest / "trainer_state.json").read_text())["best_global_step"]
    return content, tmp_path / "out" / f"checkpoint-{best}"


@pytest.mark.parametrize("lost", ["gone", "torn"])
def test_a_best_state_that_is_lost_is_an_error_that_says_how_to_go_on(
    stopped: tuple[dict[str, Any], Path], tmp_path: Path, lost: str
) -> None:
    content, best = stopped
    kept = tmp_path / "kept"
    shutil.copytree(best, kept)
    if lost == "gone":
        shutil.rmtree(best)
    else:
        (best / "trained.safetensors").unlink()
    with pytest.raises(TrainingFailedError, match=rf"best state .*{best.name} .*load_best_model_at_end: false"):
        train(parse_config(content))
    assert not (tmp_path / "out" / "checkpoint_qscorer").exists()
    shutil.rmtree(best, ignore_errors=True)
    shutil.move(kept, best)  # put back, as the message says
    facts = json.loads((train(parse_config(content)).folders["qscorer"] / "training.json").read_text())
    assert facts["best_state"] is not None


def test_the_last_weights_can_be_kept_instead_of_a_lost_best_state(stopped: tuple[dict[str, Any], Path]) -> None:
    content, best = stopped
    shutil.rmtree(best)
    content["training"]["load_best_model_at_end"] = False
    assert train(parse_config(content)).finished


def test_the_best_state_is_found_where_the_folder_was_moved(
    stopped: tuple[dict[str, Any], Path], pictures: Path, tmp_path: Path
) -> None:
    content, _ = stopped
    (tmp_path / "out").rename(tmp_path / "moved")
    content["output"] = str(tmp_path / "moved")
    facts = json.loads((train(parse_config(content)).folders["qscorer"] / "training.json").read_text())
    assert (tmp_path / "moved" / facts["best_state"]).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [40_000, 460_000, 523_000])
def test_full_disk_is_named_and_the_last_state_stays(pictures: Path, tmp_path: Path, limit: int) -> None:
    """Sizes at which safetensors, torch.save in the middle of a file, and torch.save at its end find no room."""
    content = settings(pictures, tmp_path / "out")
    status, stopped = run(content, tmp_path, STOP_AT_STEP="4")
    assert status == 0, stopped
    good = last_complete_state(tmp_path / "out")
    status, failed = run(content, tmp_path, FILE_SIZE_LIMIT=str(limit))
    assert status != 0
    assert "TrainingFailedError" in failed["stderr"] and "disk" in failed["stderr"], failed["stderr"]
    assert last_complete_state(tmp_path / "out") == good
    status, finished = run(content, tmp_path)
    assert status == 0, finished
    assert finished["finished"]
