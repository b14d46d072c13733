"""Tables of scores: formats, resuming, what is refused, and that no finished row is lost."""

import json
import os
import random
import time
from pathlib import Path
from typing import BinaryIO

import pandas as pd
import pytest
from fake_metric import FakeMetric
from pictures import encoded, random_image

from pyiqa_qscorer.data.find_images import find_images
from pyiqa_qscorer.data.score_rows import ScoreRow, columns_of, read_rows
from pyiqa_qscorer.data.score_store import ScoreTable
from pyiqa_qscorer.errors import InputError, OutputError
from pyiqa_qscorer.scorer import Scorer, score_files


@pytest.fixture
def scorer() -> Scorer:
    return Scorer(FakeMetric(), batch_size=4, workers=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(6):
        random_image(30, 20 + seed, seed).save(folder / f"{seed}.png")
    return folder


def write(scorer: Scorer, output: Path, paths: list[str], resume: bool = False, overwrite: bool = False) -> int:
    """Score `paths` into `output`; how many were not there yet."""
    with ScoreTable(output, resume, overwrite) as table:
        todo = table.open(scorer.name, scorer.identity).unfinished(paths)
        for _ in score_files(scorer, todo, table):
            pass
        table.finish(paths)
    return len(todo)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_formats_and_resume(scorer: Scorer, photos: Path, tmp_path: Path, suffix: str) -> None:
    paths = [str(photos / "0.png"), str(photos / 'odd, "name"\n.png'), str(photos / "1.png")]
    random_image(30, 40, 9).save(paths[1], "PNG")
    paths.append("missing.png")
    output = tmp_path / f"scores{suffix}"
    assert write(scorer, output, paths) == 4
    first = output.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", output.name]
    assert write(scorer, output, paths, resume=True) == 1  # what failed is tried again
    assert output.read_bytes() == first
    with ScoreTable(output, resume=True) as table:
        rows = list(table.open(scorer.name, scorer.identity).rows.values())
    assert [row.path for row in rows] == paths
    assert [row.score for row in rows[:3]] == [item.score for item in scorer.score_iter(paths[:3])]
    assert rows[3].score is None and rows[3].error is not None and "no such file" in rows[3].error
    assert (rows[0].metric, rows[0].identity) == ("FakeMetric", "0123456789abcdef")
    assert (rows[0].width, rows[0].height, rows[0].bytes) == (20, 30, os.path.getsize(paths[0]))


def test_csv_looks_as_documented(scorer: Scorer, photos: Path, tmp_path: Path) -> None:
    output, path = tmp_path / "scores.csv", photos / "0.png"
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    write(scorer, output, [str(path), "missing.png"])
    header, row, failed = output.read_text().splitlines()
    assert header == "path,score,error,metric,identity,width,height,bytes,modified" == ",".join(columns_of(ScoreRow))
    score, size = next(iter(scorer.score_iter([path]))).score, path.stat().st_size
    assert row == f"{path},{score},,FakeMetric,0123456789abcdef,20,30,{size},2023-11-14T22:13:20.123456+00:00"
    assert failed.startswith("missing.png,,") and failed.endswith(",FakeMetric,0123456789abcdef,,,,")


def test_changed_files_are_scored_again_and_others_kept(scorer, photos, tmp_path, monkeypatch) -> None:
    output, paths = tmp_path / "scores.csv", [str(photos / f"{n}.png") for n in range(4)]
    write(scorer, output, paths[:3])
    before = output.read_text().splitlines()
    random_image(30, 40, 77).save(paths[1])
    assert write(scorer, output, [paths[1], paths[3], paths[2]], resume=True) == 2
    after = output.read_text().splitlines()
    assert [line.split(",")[0] for line in after[1:]] == [paths[0], paths[1], paths[3], paths[2]]
    assert after[1] == before[1] and after[4] == before[3] and after[2] != before[2]
    monkeypatch.chdir(photos)  # another spelling is the same file
    assert write(scorer, output, ["./0.png"], resume=True) == 0


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("old.csv", {}, r"old.csv exists: --resume adds to it, --overwrite"),
        ("new.csv", {}, "has the rows of an interrupted run: --resume"),
        ("scores.txt", {}, "must end in .csv, .jsonl, .parquet, not '.*scores.txt'"),
        ("nowhere/scores.csv", {}, "the folder of the output does not exist"),
        ("folder.csv", {}, "the output is a folder"),
        ("scores.csv", {"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_impossible_outputs(tmp_path, monkeypatch, name, flags, words) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "old.csv").write_bytes(b"old")
    (tmp_path / "new.csv.partial.jsonl").write_bytes(b"{")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=words):
        ScoreTable(tmp_path / name, **flags)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "old.csv").read_bytes() == b"old"
    monkeypatch.setattr("pyiqa_qscorer.data.score_store.find_spec", lambda name: None)
    with pytest.raises(InputError, match="parquet needs pyarrow"):
        ScoreTable(tmp_path / "scores.parquet")


def test_resume_with_another_identity_is_refused(photos: Path, tmp_path: Path) -> None:
    output, paths = tmp_path / "scores.csv", [str(photos / "0.png")]
    write(Scorer(FakeMetric()), output, paths)
    before, other = output.read_bytes(), Scorer(FakeMetric(identity="f" * 64))
    words = "made by FakeMetric with identity 0123456789abcdef, but this run is .* ffffffffffffffff"
    with pytest.raises(InputError, match=words):
        write(other, output, paths, resume=True)
    assert output.read_bytes() == before and not (tmp_path / "scores.csv.partial.jsonl").exists()
    assert write(other, output, paths, overwrite=True) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("s.csv", "file,mos\na.png,3\n", "row 1 of .* is not of a score table .*columns"),
        ("s.csv", ",".join(columns_of(ScoreRow)) + "\na.png,good,,m,i,1,1,1,x\n", "row 1 .*could not convert"),
        ("s.csv", ",".join(columns_of(ScoreRow)) + "\n,1.0,,m,i,1,1,1,x\n", "it has no path"),
        ("s.jsonl", "[1, 2]\n", "row 1 of .* is not of a score table"),
        ("s.jsonl", "{]\n", "row 1 of .* is not of a score table .*Expecting"),
        ("s.csv", ",".join(columns_of(ScoreRow)) + "\n" + "a" * 200_000 + "\n", "row 1 of .*field larger"),
        ("s.parquet", "not parquet", "row 1 of .*arquet"),
    ],
)
def test_foreign_tables_are_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        ScoreTable(tmp_path / name, resume=True).open("m", "i")
    assert list(tmp_path.iterdir()) == [tmp_path / name] and (tmp_path / name).read_text() == content


def test_a_torn_last_line_is_dropped(scorer: Scorer, photos: Path, tmp_path: Path) -> None:
    paths, output = [str(path) for path in sorted(photos.iterdir())], tmp_path / "scores.jsonl"
    write(scorer, output, paths)
    whole = output.read_bytes()
    output.unlink()
    lines = whole.splitlines(keepends=True)
    for cut in (1, len(lines[2]) // 2, len(lines[2]) - 1):
        partial = tmp_path / "scores.jsonl.partial.jsonl"
        partial.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
        assert write(scorer, output, paths, resume=True) == 4 and output.read_bytes() == whole
        output.unlink()


def test_two_runs_cannot_write_one_table(tmp_path: Path) -> None:
    output = tmp_path / "s.csv"
    with ScoreTable(output) as table:  # before the model is loaded
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match="another run is writing"):
                ScoreTable(output, **flags)
        table.open("m", "i").add(ScoreRow("a.png", 1.0, metric="m", identity="i"))
        table.finish(["a.png"])
    with pytest.raises(InputError, match=r"s.csv exists"):
        ScoreTable(output)
    with ScoreTable(output, resume=True) as table:
        assert len(table.open("m", "i").rows) == 1
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("locks", [True, False])  # False: on Windows
def test_a_run_that_never_began_leaves_all_as_it_was(tmp_path, monkeypatch, locks) -> None:
    monkeypatch.setattr("pyiqa_qscorer.data.score_store.HAS_LOCKS", locks)
    output, partial = tmp_path / "s.csv", tmp_path / "s.csv.partial.jsonl"
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        ScoreTable(output, **flags).close()
        assert not list(tmp_path.iterdir())
    partial.write_bytes(b'{"path": "torn')
    for flags in ({"resume": True}, {"overwrite": True}):
        ScoreTable(output, **flags).close()
        assert partial.read_bytes() == b'{"path": "torn'


def test_a_lock_on_a_file_that_its_owner_has_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl, calls = pytest.importorskip("fcntl"), []
    flock = fcntl.flock

    def slow(file: BinaryIO, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:  # the other run ends between opening and locking
            (tmp_path / "s.csv.partial.jsonl").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with ScoreTable(tmp_path / "s.csv") as table:
        table.open("m", "i").add(ScoreRow("a.png", 1.0, metric="m", identity="i"))
        assert table.partial.read_bytes().count(b"\n") == 1 and len(calls) == 2


def test_an_output_that_cannot_be_written_keeps_the_rows(scorer, photos, tmp_path, monkeypatch) -> None:
    output, paths = tmp_path / "scores.csv", [str(path) for path in sorted(photos.iterdir())]
    output.write_text("the old table")
    real = os.replace

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match=r"No space left on device. 6 finished rows are kept.*resume"):
        write(scorer, output, paths, overwrite=True)
    assert output.read_text() == "the old table"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "scores.csv", "scores.csv.partial.jsonl"]
    monkeypatch.setattr(os, "replace", real)
    output.unlink()
    assert write(scorer, output, paths, resume=True) == 0 and len(output.read_text().splitlines()) == 7


def test_file_names_that_are_not_utf8(scorer: Scorer, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        random_image(30, 40, 0).save(os.fsdecode(name), "PNG")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    paths = find_images([tmp_path]).paths
    assert paths == [os.fsdecode(name)]
    paths.append(f"{tmp_path}/gone\udcff.png")
    for suffix in (".csv", ".jsonl", ".parquet"):
        output = tmp_path / f"scores{suffix}"
        assert write(scorer, output, paths) == 2
        assert write(scorer, output, paths, resume=True) == 1  # what failed is tried again
        assert [row.path for row in read_rows(output)] == paths
    assert name in (tmp_path / "scores.csv").read_bytes()
    assert json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[0])["path"] == paths[0]
    in_parquet = [os.fsencode(path).decode("utf-8", "backslashreplace") for path in paths]
    assert pd.read_parquet(tmp_path / "scores.parquet")["path"].tolist() == in_parquet


def test_a_path_is_no_formula_of_a_spreadsheet(scorer, photos, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(photos)
    paths = [f"{sign}1.png" for sign in "=+-@"]
    for path in paths:
        random_image(30, 40, 3).save(path, "PNG")
    assert write(scorer, tmp_path / "s.csv", [*paths, "1.png"]) == 5
    assert [row.path for row in read_rows(tmp_path / "s.csv")] == [*(f"./{path}" for path in paths), "1.png"]
    assert write(scorer, tmp_path / "s.csv", [*paths, "1.png"], resume=True) == 0


def test_a_thousand_images_ten_of_them_broken(scorer: Scorer, tmp_path: Path) -> None:
    broken, content = set(random.Random(0).sample(range(1000), 10)), encoded(random_image(8, 8, 0))
    for number in range(1000):
        (tmp_path / f"{number:03}.png").write_bytes(content[:40] if number in broken else content)
    paths, output, started = find_images([tmp_path]).paths, tmp_path / "scores.csv", time.monotonic()
    write(scorer, output, paths)
    assert time.monotonic() - started < 30
    rows = read_rows(output)
    assert [row.path for row in rows] == paths
    for failed in ([row.error is not None for row in rows], [row.score is None for row in rows]):
        assert {number for number, one in enumerate(failed) if one} == broken
