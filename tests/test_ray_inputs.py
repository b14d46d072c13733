"""Scoring on Ray by the command: shards, an object store, an interruption, a full disk."""

from __future__ import annotations

import io
import logging
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import Result, program, small_disk
from PIL import Image

from pyiqa_qscorer import Scorer

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed, nothing is wrong")
pytestmark = [pytest.mark.slow, pytest.mark.long]


def picture(index: int) -> bytes:
    content, random = io.BytesIO(), np.random.default_rng(index)
    Image.fromarray(random.integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One for all commands of this file that run in this process; its actors have credentials of a store."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("EC2_METADATA_DISABLED", "true")):
            patch.setenv(f"AWS_{name}", value)
        ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        yield
        ray.shutdown()


def on_ray(*words: str | Path) -> Result:
    return Result("score", "--engine", "ray", "--device", "cpu", *words)


def said(result: Result) -> str:
    return " ".join(result.err.split())


def rows_of(output: Path, name: str) -> dict[str, dict[str, object]]:
    rows = [row for part in (output / "parts").iterdir() for row in pq.read_table(part).to_pylist()]
    assert len({row[name] for row in rows}) == len(rows)  # each once
    return {str(row[name]): row for row in rows}


def test_shards_of_a_webdataset(tmp_path: Path) -> None:
    shards = [tmp_path / f"{shard}.tar" for shard in range(2)]
    contents = {f"{index:03d}": picture(index) if index != 4 else b"no picture" for index in range(8)}
    for shard, path in enumerate(shards):
        with tarfile.open(path, "w") as tar:
            for key in list(contents)[shard::2]:
                for kind, content in (("png", contents[key]), ("txt", b"a caption")):
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    done = on_ray(*shards, "--output", tmp_path / "out", "--batch-size", "1")
    assert done.code == 1 and "7 images scored, 1 failed" in said(done) and "004: " in said(done), done.err
    rows = rows_of(tmp_path / "out", "__key__")
    assert list(rows) and rows.keys() == contents.keys() and rows["003"]["txt"] == b"a caption"
    assert "not an image" in str(rows.pop("004")["error"])
    expected = Scorer("qscorer-mini", device="cpu", batch_size=1).score([contents[key] for key in sorted(rows)])
    assert [rows[key]["score"] for key in sorted(rows)] == expected.tolist()
    refused = on_ray(*shards, "--output", tmp_path / "other", "--column", "jpg")
    assert refused.code == 2 and "has no column 'jpg'" in said(refused)


@pytest.fixture
def store() -> Iterator[str]:
    """Address of a bucket of a server that speaks S3's protocol, on loopback."""
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed, nothing is wrong")
    import boto3

    served = server.ThreadedMotoServer("127.0.0.1", 0)
    served.start()
    _, port = served.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1")
    client.create_bucket(Bucket="photos")
    for index in range(5):
        client.put_object(Bucket="photos", Key=f"holiday/day one/{index}.png", Body=picture(index))
    client.put_object(Bucket="photos", Key="holiday/broken.png", Body=b"no picture")
    client.put_object(Bucket="photos", Key="holiday/notes.txt", Body=b"text")
    yield f"s3://photos/holiday?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    served.stop()


def test_object_store(store: str, tmp_path: Path) -> None:
    done = on_ray(store, "--output", tmp_path / "out", "--batch-size", "1")
    assert done.code == 1 and "5 images scored, 1 failed" in said(done), done.err
    rows = rows_of(tmp_path / "out", "path")
    scores = [row["score"] for path, row in sorted(rows.items()) if "day%20one" in path]
    assert scores == Scorer("qscorer-mini", device="cpu", batch_size=1).score(map(picture, range(5))).tolist()
    # Addresses in a table: one of nothing is an error of its row.
    paths = [*sorted(rows)[1:3], next(iter(rows)).replace(".png", "-not-there.png")]
    pq.write_table(pa.table({"path": paths}), tmp_path / "list.parquet")
    done = on_ray(tmp_path / "list.parquet", "--output", tmp_path / "listed")
    assert "2 images scored, 1 failed" in said(done), done.err
    refused = on_ray(store.replace("photos/holiday", "secret/holiday"), "--output", tmp_path / "other")
    assert refused.code == 2 and "cannot be read" in refused.err and "Traceback" not in refused.err


def test_interrupted_and_continued(tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for index in range(1500):
        (photos / f"{index:04d}.png").write_bytes(picture(index % 7))
    words = ["score", "--engine", "ray", "--device", "cpu", str(photos), "--output", str(output)]
    command = [sys.executable, "-m", "pyiqa_qscorer.cli", *words]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **program())
    deadline = time.monotonic() + 300
    while not list((output / "parts").glob("*.parquet")) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 130 and "Traceback" not in errors, errors
    before = rows_of(output, "path")
    assert 0 < len(before) < 1500
    done = Result(*words)
    assert done.code == 0 and "1,500 images scored, 0 failed" in said(done), done.err
    rows = rows_of(output, "path")
    assert len(rows) == 1500 and all(rows[path] == row for path, row in before.items())


def test_full_disk_is_said_and_the_rest_is_scored_later(tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    output.mkdir()
    (photos / "a.png").write_bytes(picture(0))
    with small_disk(output, "12k") as mount:
        done = on_ray(photos, "--output", output)
        assert done.code == 2 and "No space left" in said(done) and "Traceback" not in said(done), done.err
        subprocess.run([*mount, "remount,size=10m"], check=True)
        done = on_ray(photos, "--output", output)
        assert done.code == 0 and "1 image scored, 0 failed" in said(done), done.err
        assert len(rows_of(output, "path")) == 1
