"""Scoring on Ray Data: the scores of `Scorer`, bad rows, resuming, a killed actor. Slow: every run starts actors."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pyiqa_qscorer import Scorer
from pyiqa_qscorer.cli.app import app
from pyiqa_qscorer.errors import InputError, UnknownMetricError

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed, nothing is wrong")
pytestmark = pytest.mark.slow

from pyiqa_qscorer.ray import ray_scoring, score_dataset, score_to_folder  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(24):
        size = (64 + 8 * (index % 3), 80)
        picture = Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).resize((96, 96))
        picture.save(folder / f"{index:02d}.png")
    return folder


def files_of(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.png"))]


def test_bytes_of_a_parquet_file(pictures: Path, tmp_path: Path) -> None:
    files = files_of(pictures)[:8]
    content: list[bytes | None] = [Path(path).read_bytes() for path in files]
    content[3:3] = [b"no picture", None]
    ids = list(range(len(content)))
    pq.write_table(pa.table({"id": ids, "bytes": pa.array(content, pa.binary())}), tmp_path / "images.parquet")
    dataset = ray.data.read_parquet(str(tmp_path / "images.parquet"))
    scored = score_dataset(dataset, batch_size=1).materialize()
    assert scored.num_blocks() >= len(ids) / 4 > 1  # one for every actor, though Ray reads this file as one
    rows = scored.take_all()
    assert [row["id"] for row in rows] == ids and all("bytes" not in row for row in rows)
    expected = Scorer("qscorer-mini", device="cpu", batch_size=1).score(files)
    # Ray may cut the batches otherwise; equality to the bit is tested with batches of one.
    assert [row["score"] for row in rows if row["error"] is None] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [row["score"] for row in rows[3:5]] == [None, None]
    assert "not an image that Pillow can read" in rows[3]["error"] and rows[4]["error"] == "this row has no image"
    assert rows[0]["width"] == rows[0]["height"] == 96 and rows[0]["metric"] == "qscorer-mini"
    with pytest.raises(InputError, match=r"no column 'byte'; did you mean 'bytes'"):
        score_dataset(dataset, column="byte")
    with pytest.raises(UnknownMetricError):
        score_dataset(dataset, "qscorer-min")


@pytest.mark.long
def test_second_run_scores_only_what_is_missing(pictures: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "photos", tmp_path / "scores"
    folder.mkdir()
    for path in files_of(pictures)[:5]:
        (folder / Path(path).name).write_bytes(Path(path).read_bytes())
    (folder / "broken.png").write_bytes(b"no picture")
    command = ["score", "--engine", "ray", str(folder), "--output", str(output), "--device", "cpu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "5 images scored, 1 failed" in done.output, done.output
    before = {path: path.read_bytes() for path in (output / "parts").iterdir()}
    (folder / "new.png").write_bytes(Path(files_of(pictures)[6]).read_bytes())
    done = CliRunner().invoke(app, command)
    assert "6 images scored, 1 failed" in done.output, done.output
    added = [path for path in (output / "parts").iterdir() if path not in before]
    assert sum(pq.read_table(path).num_rows for path in added) == 1
    assert all(path.read_bytes() == content for path, content in before.items())
    done = CliRunner().invoke(app, [*command, "--metric", "qscorer"])
    assert done.exit_code == 2 and "choose another folder" in " ".join(done.output.split()), done.output


@pytest.mark.long
def test_a_killed_actor_loses_and_repeats_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_scoring, "ROWS_OF_A_BLOCK", 4)
    killed: list[int] = []
    deadline = time.monotonic() + 120

    def kill() -> None:
        while not killed and time.monotonic() < deadline:
            time.sleep(0.1)
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, IndexError):  # of processes that end meanwhile
                    if "MapWorker" in process.cmdline()[0]:
                        time.sleep(1)
                        process.kill()
                        killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    scored = score_to_folder([str(pictures)], tmp_path / "out", batch_size=1, metric_options={"dtype": "float32"})
    killer.join()
    assert killed, "the actor was not found"
    rows = sorted(scored.take_all(), key=lambda row: row["path"])
    assert [row["path"] for row in rows] == files_of(pictures)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in an actor of one core
    expected = Scorer("qscorer-mini", device="cpu", batch_size=1, dtype="float32").score(files_of(pictures))
    torch.set_num_threads(before)
    assert [row["score"] for row in rows] == expected.tolist()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.png", "--engine", "spark"], "--engine must be ray"),
        (["a.png", "--engine", "ray"], "give --output DIR"),
        (["a.png", "--engine", "ray", "-o", "x.csv"], "give --output DIR"),
        (["a.png", "--engine", "ray", "-o", "x", "--worst", "3"], "--worst does not go with"),
        (["a.png", "b.parquet", "--engine", "ray", "-o", "{tmp}/x"], "must be of one kind"),
    ],
)
def test_bad_input(words: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["score", *(word.replace("{tmp}", str(tmp_path)) for word in words)])
    assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
