"""The scripts of `examples/`, each run as a person would run it."""

import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from environments import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
CLEAN = ("astronaut.jpg", "cat.jpg", "coffee.jpg")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Standard output of an example, which must succeed without the network."""

    def output(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("no network in this test"))
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as end:
            assert not end.code
        return capsys.readouterr().out

    return output


def test_every_example_is_short_and_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for example in EXAMPLES.glob("*.py"):
        assert f'run("{example.name}"' in source, f"{example.name} has no test here"
        assert len(example.read_text(encoding="utf-8").splitlines()) <= 40, f"{example.name} is longer than 40 lines"


def test_quick_examples(tmp_path: Path, run: Callable[..., str]) -> None:
    lines = [line.split() for line in run("score_a_folder.py").splitlines()]
    assert {name for _, name in lines[:3]} == set(CLEAN)  # the undistorted photos come first
    assert len(lines) == 9
    assert "one hot" in run("error_analysis.py", str(tmp_path))
    assert (tmp_path / "report" / "errors.html").stat().st_size > 0


def test_hugging_face_dataset(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the example's package `datasets` is not installed, nothing is wrong")
    lines = run("score_a_hugging_face_dataset.py").splitlines()
    assert lines[0] == "kept 3 of 9"
    assert [float(line) for line in lines[1:]] == sorted(float(line) for line in lines[1:])


def test_webdataset_shards(tmp_path: Path, run: Callable[..., str]) -> None:
    webdataset = pytest.importorskip("webdataset", reason="the example's package is not installed, nothing is wrong")
    with webdataset.ShardWriter(str(tmp_path / "in-%03d.tar"), maxcount=4, verbose=0) as writer:
        for photo in sorted((REPOSITORY / "tests" / "photos").glob("*.jpg")):
            writer.write({"__key__": photo.stem, "jpg": photo.read_bytes(), "txt": photo.stem})
        writer.write({"__key__": "broken", "jpg": b"no picture"})
    said = run("filter_webdataset_shards.py", str(tmp_path / "in-{000..002}.tar"), str(tmp_path / "good-%03d.tar"))
    assert "kept 3 of 10" in said
    kept = list(webdataset.WebDataset(str(tmp_path / "good-000.tar"), shardshuffle=False))
    assert {"astronaut", "cat", "coffee"} <= {sample["__key__"] for sample in kept}
    assert all(float(sample["quality.txt"]) >= 3.5 for sample in kept)


@pytest.mark.slow
def test_leaderboard(tmp_path: Path, run: Callable[..., str]) -> None:
    output = run("leaderboard.py", str(tmp_path))
    assert "qscorer-mini" in output and "piqe" in output
    assert (tmp_path / "report" / "report.html").stat().st_size > 0


@pytest.mark.slow
def test_loss_in_a_training_loop(run: Callable[..., str]) -> None:
    lines = run("loss_in_a_training_loop.py").splitlines()
    errors = [float(line.split()[3].rstrip(",")) for line in lines]
    assert len(errors) == 10 and errors[-1] < errors[0]


@pytest.mark.slow
def test_train_on_a_csv(tmp_path: Path, run: Callable[..., str]) -> None:
    output = run("train_on_a_csv.py", str(tmp_path))
    assert "Scores of the blurred cat" in output
    assert (tmp_path / "run" / "checkpoint_qscorer" / "model.safetensors").exists()
