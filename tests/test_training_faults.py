"""What a training does where its folder is shared, its states are gone or damaged, or disk or a worker fails."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_training import settings
from train_in_subprocess import run, run_here

from pyiqa_qscorer.errors import TrainingFailedError
from pyiqa_qscorer.training import output
from pyiqa_qscorer.training.config import parse_config
from pyiqa_qscorer.training.run import train
from pyiqa_qscorer.training.trainer import QScorerTrainer, last_complete_state


def test_a_second_training_in_the_same_folder_is_refused_and_the_first_ends_well(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(settings(pictures, tmp_path / "out", training={"num_train_epochs": 3}))
    compute_loss, refused = QScorerTrainer.compute_loss, []

    def second(self: QScorerTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4 and not refused:
            with pytest.raises(TrainingFailedError) as error, output.opened_output(config):
                pass
            refused.append(str(error.value))
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(QScorerTrainer, "compute_loss", second)
    facts = json.loads((train(config).folders["qscorer"] / "training.json").read_text())
    assert "another process trains into" in refused[0]
    assert facts["best_state"] is not None and facts["steps"] == 9


@pytest.fixture(scope="module")
def stopped_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A configuration whose run was stopped in its third epoch, and its folder; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped")
    content = settings(pictures, folder / "out", training={"num_train_epochs": 3, "save_total_limit": 3})
    assert not run_here(content, STOP_AT_STEP="8")["finished"]
    return content, folder / "out"


@pytest.fixture
def stopped(stopped_run: tuple[dict[str, Any], Path], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A copy of it, and the best state so far."""
    newest = last_complete_state(Path(shutil.copytree(stopped_run[1], tmp_path / "out")))
    assert newest is not None and newest.name == "checkpoint-8"
    best = json.loads((newest / "trainer_state.json").read_text())["best_global_step"]
    content = {**stopped_run[0], "output": str(tmp_path / "out"), "training": {**stopped_run[0]["training"]}}
    return content, tmp_path / "out" / f"checkpoint-{best}"


@pytest.mark.parametrize("lost", ["gone", "torn"])
def test_a_best_state_that_is_lost_is_an_error_that_says_how_to_go_on(stopped, tmp_path, lost) -> None:
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


def test_the_last_weights_can_be_kept_instead_of_a_lost_best_state(stopped) -> None:
    content, best = stopped
    shutil.rmtree(best)
    content["training"]["load_best_model_at_end"] = False
    assert train(parse_config(content)).finished


def test_the_best_state_is_found_where_the_folder_was_moved(stopped, pictures, tmp_path) -> None:
    content, _ = stopped
    (tmp_path / "out").rename(tmp_path / "moved")
    content["output"] = str(tmp_path / "moved")
    facts = json.loads((train(parse_config(content)).folders["qscorer"] / "training.json").read_text())
    assert (tmp_path / "moved" / facts["best_state"]).is_dir()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = file.read_bytes()
    part = slice(len(content) // 4, len(content) // 2)
    file.write_bytes(content[: part.start] + bytes(255 - byte for byte in content[part]) + content[part.stop :])


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, Path.touch], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_state_is_set_aside_for_the_one_before(stopped, name, damage, caplog) -> None:
    out = stopped[1].parent
    states, whole = {state.name: state for state in out.glob("checkpoint-*")}, damage is Path.touch
    damage(states["checkpoint-8"] / name)
    content, losses = stopped[0], json.loads((states["checkpoint-8"] / "trainer_state.json").read_text())["log_history"]
    (folder,) = train(parse_config(content)).folders.values()
    curves = json.loads((folder / "training.json").read_text())["curves"]
    before, after = ([line["loss"] for line in lines if "loss" in line] for lines in (losses, curves))
    assert after[:8] == pytest.approx(before, rel=1e-4) and (out / "damaged-checkpoint-8").exists() is not whole
    assert (f"{name} of the state {states['checkpoint-8']} cannot be read" in caplog.text) is not whole


def test_where_no_state_is_whole_nothing_is_trained(stopped: tuple[dict[str, Any], Path]) -> None:
    states = sorted(stopped[1].parent.glob("checkpoint-*"))
    for state in states:
        truncate(state / "optimizer.pt")
    with pytest.raises(TrainingFailedError, match=r"no state .* is whole: optimizer.pt of checkpoint-8"):
        train(parse_config(stopped[0]))
    assert sorted(stopped[1].parent.glob("checkpoint-*")) == states


def test_a_killed_worker_is_an_error_that_says_how_to_go_on(pictures: Path, tmp_path: Path) -> None:
    content = settings(pictures, tmp_path / "out", training={"num_train_epochs": 2, "dataloader_num_workers": 1})
    with pytest.raises(TrainingFailedError, match=r"a process that reads images was killed .*from checkpoint-3"):
        run_here(content, KILL_WORKER_AT_STEP="4")
    content["training"]["dataloader_num_workers"] = 0
    assert train(parse_config(content)).finished


def test_a_killed_worker_is_named_though_torchs_handler_interrupts(pictures, tmp_path, monkeypatch) -> None:
    """Its signal comes at any moment: here while the connection that broke first is being looked at."""
    pending = [RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")]
    look = output._worker_died

    def interrupted(error: Exception) -> bool:
        if pending:
            raise pending.pop()
        return look(error)

    monkeypatch.setattr(output, "_worker_died", interrupted)
    config = parse_config(settings(pictures, tmp_path / "out"))
    expected = r"a process that reads images was killed .*from the start"
    with pytest.raises(TrainingFailedError, match=expected), output.opened_output(config):
        raise ConnectionResetError


@pytest.mark.slow
@pytest.mark.parametrize("limit", [40_000, 460_000, 523_000])
def test_full_disk_is_named_and_the_last_state_stays(stopped, tmp_path, limit) -> None:
    """Sizes at which safetensors, torch.save in the middle of a file, and torch.save at its end find no room."""
    content, good = stopped[0], last_complete_state(tmp_path / "out")
    status, failed = run(content, tmp_path, FILE_SIZE_LIMIT=str(limit))
    assert status != 0
    assert "TrainingFailedError" in failed["stderr"] and "disk" in failed["stderr"], failed["stderr"]
    assert last_complete_state(tmp_path / "out") == good and run_here(content)["finished"]
