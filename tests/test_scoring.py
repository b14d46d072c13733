"""`Scorer`, finding files, and score tables, with a quick stand-in for the model."""

import csv
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pytest
import torch
from fake_metric import FakeMetric
from PIL import Image

from pyiqa_qscorer import scorer as scoring
from pyiqa_qscorer.data.find_images import find_images
from pyiqa_qscorer.data.score_rows import ScoreRow, columns_of, read_rows
from pyiqa_qscorer.data.score_store import ScoreTable
from pyiqa_qscorer.errors import FailedImagesError, ImageError, InputError, OutputError, QScorerError
from pyiqa_qscorer.images.inputs import ImageLike
from pyiqa_qscorer.images.preprocessing import pixels_from_pil
from pyiqa_qscorer.images.staging import Stager
from pyiqa_qscorer.registry import METRICS, resolve_metric_options
from pyiqa_qscorer.scorer import Scorer, score_files


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


@pytest.fixture
def scorer() -> Scorer:
    return Scorer(FakeMetric(), batch_size=4, workers=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(6):
        picture(seed, 20 + seed, 30).save(folder / f"{seed}.png")
    return folder


def test_every_kind_of_image_has_the_same_score(scorer: Scorer, tmp_path: Path) -> None:
    image = picture(1)
    path = tmp_path / "image.png"
    image.save(path)
    kinds = [
        str(path),
        path,
        path.read_bytes(),
        image,
        Image.open(path),
        as_tensor(image),
        as_tensor(image).half(),
        np.asarray(image),
        np.dstack([np.asarray(image), np.full((30, 40), 7, np.uint8)]),  # alpha is dropped
        np.asarray(image)[:, ::-1][:, ::-1],  # not contiguous
    ]
    scores = scorer.score(kinds)
    assert scores.dtype == np.float32 and scores.shape == (len(kinds),)
    assert np.all(scores == scores[0])
    for kind in kinds:
        assert scorer.score(kind).tolist() == [scores[0]]
    gray = picture(2).convert("L")
    values = np.asarray(gray)
    scores = scorer.score([gray, values, values[:, :, None], torch.from_numpy(values.copy())[None] / 255])
    assert np.all(scores == scores[0])


def test_four_axes_are_many_images(scorer: Scorer) -> None:
    images = [picture(seed) for seed in range(3)]
    expected = scorer.score(images).tolist()
    assert scorer.score(torch.stack([as_tensor(image) for image in images])).tolist() == expected
    assert scorer.score(np.stack([np.asarray(image) for image in images])).tolist() == expected


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 4), (16, 2), (100, 1)])
def test_order_and_values_do_not_depend_on_batching(batch_size: int, workers: int) -> None:
    chance = random.Random(batch_size)
    images: list[ImageLike] = []
    for seed in range(37):
        image = picture(seed, chance.randint(1, 90), chance.randint(1, 90))
        images.append(chance.choice([image, encoded(image), as_tensor(image), np.asarray(image)]))
    alone = Scorer(FakeMetric(), batch_size=1, workers=1)
    expected = [alone.score(image).item() for image in images]
    metric = FakeMetric()
    assert Scorer(metric, batch_size=batch_size, workers=workers).score(images).tolist() == expected
    assert sum(metric.batches) == 37 and max(metric.batches) <= batch_size


def test_no_images_no_scores(scorer: Scorer) -> None:
    assert scorer.score([]).shape == (0,)


def test_results_tell_source_and_size(scorer: Scorer, photos: Path) -> None:
    path = str(photos / "3.png")
    on_disk, in_memory = scorer.score_iter([path, picture(1, 8, 9)])
    assert (on_disk.index, on_disk.source, on_disk.width, on_disk.height) == (0, path, 23, 30)
    assert (in_memory.index, in_memory.source, in_memory.width) == (1, "<PIL image 8x9>", 8)
    assert on_disk.score is not None and on_disk.error is None
    assert len(repr(on_disk.score)) <= 10 and np.float32(on_disk.score) == scorer.score(path)[0]


def test_one_lazy_pil_image_many_times(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    picture(0, 700, 500).save(path)
    scores = Scorer(FakeMetric(), batch_size=8, workers=8).score([Image.open(path)] * 24)
    assert np.all(scores == scores[0])


def test_input_is_read_lazily_and_threads_end(scorer: Scorer) -> None:
    taken = itertools.count()
    endless = (picture(next(taken)) for _ in itertools.repeat(None))
    results = scorer.score_iter(endless)
    assert [next(results).index for _ in range(9)] == list(range(9))
    assert next(taken) <= 3 * 4 + 3 * 4 + 2  # three batches were begun, two more and the workers run ahead
    results.close()
    assert not [thread.name for thread in threading.enumerate() if "qscorer" in thread.name]


def test_error_of_the_input_comes_after_its_images(scorer: Scorer) -> None:
    def images():
        yield from (picture(seed) for seed in range(6))
        raise OSError("the share is gone")

    results = scorer.score_iter(images())
    assert [next(results).index for _ in range(6)] == list(range(6))
    with pytest.raises(OSError, match="share is gone"):
        next(results)


def test_scoring_leaves_gradients_as_they_are(scorer: Scorer) -> None:
    image = as_tensor(picture(0)).requires_grad_()
    for _ in scorer.score_iter([image] * 5):
        assert torch.is_grad_enabled()
    assert image.grad is None


def test_the_model_gets_the_pixels_of_pillow_to_the_bit(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(seed, 20 + 9 * seed, 40) for seed in range(7)]
    seen: list[torch.Tensor] = []
    score = scorer.metric.score_pixels
    monkeypatch.setattr(scorer.metric, "score_pixels", lambda pixels: (seen.append(pixels), score(pixels))[1])
    scorer.score([as_tensor(image) if seed % 2 else image for seed, image in enumerate(images)])
    expected = torch.stack([pixels_from_pil(image, 56) for image in images])
    assert torch.equal(torch.cat(seen), expected)


def test_the_next_batch_is_brought_while_the_model_works(monkeypatch: pytest.MonkeyPatch) -> None:
    staged, waits = threading.Semaphore(0), []
    stage = Stager.stage

    def counted(self: Stager, prepared: object) -> object:
        batch = stage(self, prepared)
        staged.release()
        return batch

    class Waiting(FakeMetric):
        def score_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
            # Its own batch and, but for the last, the next.
            count = 2 if not self.batches else 1 if len(self.batches) < 2 else 0
            waits.append(all(staged.acquire(timeout=20) for _ in range(count)))
            return super().score_pixels(pixel_values)

    monkeypatch.setattr(Stager, "stage", counted)
    metric = Waiting()
    assert len(Scorer(metric, batch_size=2, workers=1).score([picture(seed) for seed in range(6)])) == 6
    assert metric.batches == [2, 2, 2] and waits == [True, True, True]


def faulty(tmp_path: Path) -> dict[str, tuple[object, str]]:
    """Images that must fail, with words that the reason must have."""
    good = encoded(picture(0))
    files = {"truncated.png": good[:600], "text.png": b"not an image", "empty.png": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    nan = as_tensor(picture(0))
    nan[1, 2, 3] = math.nan
    return {
        "truncated": (str(tmp_path / "truncated.png"), "truncated"),
        "not an image": (tmp_path / "text.png", "not an image"),
        "empty": (str(tmp_path / "empty.png"), "empty"),
        "missing": (str(tmp_path / "missing.png"), "no such file"),
        "folder": (str(tmp_path), "folder"),
        "url": ("https://example.org/a.png", "URL"),
        "bytes": (good[:600], "truncated"),
        "rank": (torch.zeros(3, 4), r"\(3, 4\)"),
        "channels": (torch.zeros(2, 4, 4), "channels"),
        "nan": (nan, "finite"),
        "8-bit values": (as_tensor(picture(0)) * 255, "divide by 255"),
        "sparse tensor": (as_tensor(picture(0)).to_sparse(), "dense .* torch.sparse_coo: give"),
        "meta tensor": (torch.zeros(3, 4, 4, device="meta"), "hold values.* meta"),
        "mkldnn tensor": (as_tensor(picture(0)).to_mkldnn(), "dense .*mkldnn"),
        "integer tensor": (torch.zeros(3, 4, 4, dtype=torch.uint8), "uint8"),
        "float array": (np.zeros((4, 4, 3), np.float32), "uint8"),
        "nothing": (np.zeros((0, 4, 3), np.uint8), "uint8"),
        "kind": (42, "int"),
    }


def test_failed_images_are_listed_and_the_others_scored(scorer: Scorer, tmp_path: Path) -> None:
    cases = faulty(tmp_path)
    images = [item for image, _ in cases.values() for item in (image, picture(1))]
    expected = scorer.score(picture(1)).item()
    with pytest.raises(FailedImagesError) as caught:
        scorer.score(images)
    error = caught.value
    assert isinstance(error, ImageError)
    assert error.scores.tolist()[1::2] == [expected] * len(cases)
    assert np.isnan(error.scores[::2]).all()
    assert [failure.index for failure in error.failures] == list(range(0, len(images), 2))
    for failure, (_, words) in zip(error.failures, cases.values(), strict=True):
        assert failure.score is None and failure.error is not None
        assert re.search(words, failure.error) and "\n" not in failure.error
    assert f"[0] {tmp_path / 'truncated.png'}: " in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.failures == error.failures
    np.testing.assert_array_equal(scorer.score(images, on_error="nan"), error.scores)


def test_a_long_list_of_failures_is_cut(scorer: Scorer) -> None:
    with pytest.raises(FailedImagesError, match=r"25 of 25.*\n(.*\n){20}  and 5 more: see .failures"):
        scorer.score(["missing.png"] * 25)


def test_wrong_arguments_are_named(scorer: Scorer) -> None:
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'nan', not 'ignore'"):
        scorer.score([], on_error="ignore")
    with pytest.raises(TypeError, match="iterable of images, not a str"):
        scorer.score_iter("a.png")
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, not 0"):
        Scorer(FakeMetric(), batch_size=0)
    with pytest.raises(ValueError, match="workers"):
        Scorer(FakeMetric(), workers=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Linear has no score_pixels"):
        Scorer(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"dtype: options go with a metric name"):
        Scorer(FakeMetric(), dtype="float32")
    with pytest.raises(QScorerError, match="no metric 'qscorrer'; did you mean 'qscorer'"):
        Scorer("qscorrer")
    for option, near in (("chekpoint", "checkpoint"), ("devise", "device"), ("worker", "workers")):
        for metric in ("qscorer", FakeMetric()):
            with pytest.raises(TypeError, match=f"no option '{option}'; did you mean '{near}'"):
                Scorer(metric, **{option: "x"})


def test_devices() -> None:
    assert Scorer(FakeMetric()).device == torch.device("cpu")
    assert scoring.resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    cannot = "cannot be used here .*: use 'cpu' or 'cuda'"
    for device, words in (
        *(("gpu", "must be like 'cpu'"), ("cuda:99", "does not exist")),
        *(("meta", cannot), ("ipu", cannot)),
    ):
        with pytest.raises(QScorerError, match=words):
            Scorer(FakeMetric(), device=device)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "qscorer-mini"),
        ({"checkpoint": "x"}, "qscorer"),  # not taken for one of the small model
        ({"metric": "qscorer_4bit", "checkpoint": "x", "clamp": False}, "qscorer_4bit"),
    ],
)
def test_name_and_options_reach_the_metric(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], name: str) -> None:
    built = []

    def build(name: str, options: dict, device: torch.device) -> FakeMetric:
        built.append(resolve_metric_options(name, options))
        return FakeMetric()

    monkeypatch.setattr(scoring, "build_metric", build)
    scorer = Scorer(device="cpu", **given)
    assert built == [METRICS[name].options | {key: value for key, value in given.items() if key != "metric"}]
    assert repr(scorer).startswith(f"Scorer({name!r}, device='cpu', batch_size=16, workers=")
    assert scorer.identity == "0123456789abcdef"


@pytest.mark.parametrize(
    ("batch_size", "raised", "error", "words"),
    [
        (4, KeyError("a bug"), KeyError, "a bug"),
        (4, torch.cuda.OutOfMemoryError("CUDA out of memory"), QScorerError, r"lower batch_size \(now 4\)"),
        (1, torch.cuda.OutOfMemoryError("CUDA out of memory"), QScorerError, "smaller dtype"),
    ],
)
def test_errors_of_the_model_are_raised_and_memory_has_advice(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, raised: Exception, error: type[Exception], words: str
) -> None:
    def broken(pixel_values: torch.Tensor) -> torch.Tensor:
        raise raised

    scorer = Scorer(FakeMetric(), batch_size=batch_size)
    monkeypatch.setattr(scorer.metric, "score_pixels", broken)
    with pytest.raises(error, match=words):
        scorer.score([picture(0)] * 5)


def test_a_refused_image_does_not_take_its_neighbours_along() -> None:
    images = [picture(seed) for seed in range(6)] + [Image.new("RGB", (9, 9), "white")]
    scores = Scorer(FakeMetric()).score(images)
    bright = scores.argmax()
    picky = Scorer(FakeMetric(refuse=float(np.sort(scores)[-2]) + 1e-6), batch_size=4)
    with pytest.raises(FailedImagesError, match="not finite") as caught:
        picky.score(images)
    assert [failure.index for failure in caught.value.failures] == [bright]
    assert np.delete(caught.value.scores, bright).tolist() == np.delete(scores, bright).tolist()


def test_a_score_that_is_no_number_is_an_error(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer.metric, "score_pixels", lambda pixels: torch.tensor([math.nan, 1.0, math.inf]))
    results = list(scorer.score_iter([picture(0)] * 3))
    assert [item.score for item in results] == [None, 1.0, None]
    assert results[0].error == "the model's score is nan"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of all kinds; the working folder, so that paths in tests are short."""
    names = ["b.png", "a.JPG", "notes.txt", "scan.pdf", "deep/er/c.webp", "deep/d.tif", "Z/e.bmp", "x[1].png"]
    for name in [*names, ".hidden.png", ".git/f.png", "data.h5", "film.mpg", "plot.eps"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL = ["Z/e.bmp", "a.JPG", "b.png", "deep/d.tif", "deep/er/c.webp", "x[1].png"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["."], [f"./{path}" for path in ALL]),
        (["*.png"], ["b.png", "x[1].png"]),
        (["*"], ALL),
        (["**"], ALL),
        (["**/*.tif"], ["deep/d.tif"]),
        (["deep/**/*.webp"], ["deep/er/c.webp"]),
        (["**/er"], ["deep/er/c.webp"]),
        (["./de*/d.???"], ["./deep/d.tif"]),
        (["[ab].*"], ["a.JPG", "b.png"]),
        (["x[1].png"], ["x[1].png"]),  # a file of that very name wins
        ([".git/*.png"], [".git/f.png"]),
        # A named file is taken whatever its name; each file once.
        (["notes.txt", ".hidden.png", "missing.png"], ["notes.txt", ".hidden.png", "missing.png"]),
        (["b.png", "./b.png", "*.png", Path("deep")], ["b.png", "x[1].png", "deep/d.tif", "deep/er/c.webp"]),
    ],
)
def test_files_folders_and_patterns(tree: Path, given: list[str | Path], expected: list[str]) -> None:
    found = find_images(given)
    assert found.paths == expected and found.repeated == 2 * ("./b.png" in given)
    if "**" in str(given[0]):
        assert find_images([f"{tree}/{given[0]}"]).paths == [f"{tree}/{path}" for path in expected]


def test_links(tree: Path) -> None:
    (tree / "deep/er/up").symlink_to(tree / "deep")
    (tree / "deep/other").symlink_to(tree / "Z")
    (tree / "deep/broken.png").symlink_to(tree / "gone.png")
    (tree / "deep/loop.png").symlink_to(tree / "deep/loop.png")
    os.mkfifo(tree / "deep/pipe.png")  # reading it would wait for ever
    expected = ["deep/broken.png", "deep/d.tif", "deep/er/c.webp", "deep/loop.png", "deep/other/e.bmp"]
    assert find_images(["deep"]).paths == expected
    assert find_images(["deep/**"]).paths == expected
    (tree / "Z/loop").symlink_to(".")  # and back
    for pattern in ("Z/*", "Z/**", "Z"):
        assert find_images([pattern]).paths == ["Z/e.bmp"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("https://example.org/a.png", r"URLs are not fetched: download .*https://example.org/a.png"),
        ("s3://bucket/a.png", "URLs are not fetched"),
        (".git/objects", "no image file in folder '.git/objects'"),
        ("*.gif", r"no image file matches the pattern '\*.gif'"),
        ("nowhere/**/*.gif", "no image file matches the pattern"),
    ],
)
def test_inputs_that_cannot_be_meant(tree: Path, given: str, words: str) -> None:
    (tree / ".git/objects").mkdir()
    with pytest.raises(InputError, match=words):
        find_images(["b.png", given])
    with pytest.raises(InputError, match="nothing to score"):
        find_images([])


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
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    paths = [str(photos / "0.png"), str(photos / 'odd, "name"\n.png'), str(photos / "1.png")]
    picture(9).save(paths[1], "PNG")
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
    output = tmp_path / "scores.csv"
    path = photos / "0.png"
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    write(scorer, output, [str(path), "missing.png"])
    header, row, failed = output.read_text().splitlines()
    assert header == "path,score,error,metric,identity,width,height,bytes,modified" == ",".join(columns_of(ScoreRow))
    score = next(iter(scorer.score_iter([path]))).score
    size = path.stat().st_size
    assert row == f"{path},{score},,FakeMetric,0123456789abcdef,20,30,{size},2023-11-14T22:13:20.123456+00:00"
    assert failed.startswith("missing.png,,") and failed.endswith(",FakeMetric,0123456789abcdef,,,,")


def test_changed_files_are_scored_again_and_others_kept(
    scorer: Scorer, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "scores.csv"
    paths = [str(photos / f"{n}.png") for n in range(4)]
    write(scorer, output, paths[:3])
    before = output.read_text().splitlines()
    picture(77).save(paths[1])
    assert write(scorer, output, [paths[1], paths[3], paths[2]], resume=True) == 2
    after = output.read_text().splitlines()
    assert [line.split(",")[0] for line in after[1:]] == [paths[0], paths[1], paths[3], paths[2]]
    assert after[1] == before[1] and after[4] == before[3]
    assert after[2] != before[2]
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
def test_impossible_outputs(tmp_path: Path, name: str, flags: dict[str, bool], words: str) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "old.csv").write_bytes(b"old")
    (tmp_path / "new.csv.partial.jsonl").write_bytes(b"{")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=words):
        ScoreTable(tmp_path / name, **flags)
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "old.csv").read_bytes() == b"old"


def test_parquet_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyiqa_qscorer.data.score_store.find_spec", lambda name: None)
    with pytest.raises(InputError, match="parquet needs pandas and pyarrow"):
        ScoreTable(tmp_path / "scores.parquet")


def test_resume_with_another_identity_is_refused(photos: Path, tmp_path: Path) -> None:
    output, paths = tmp_path / "scores.csv", [str(photos / "0.png")]
    write(Scorer(FakeMetric()), output, paths)
    before = output.read_bytes()
    other = Scorer(FakeMetric(identity="f" * 64))
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
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        ScoreTable(tmp_path / name, resume=True).open("m", "i")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_a_torn_last_line_is_dropped(scorer: Scorer, photos: Path, tmp_path: Path) -> None:
    paths = [str(path) for path in sorted(photos.iterdir())]
    output = tmp_path / "scores.jsonl"
    write(scorer, output, paths)
    whole = output.read_bytes()
    output.unlink()
    lines = whole.splitlines(keepends=True)
    for cut in (1, len(lines[2]) // 2, len(lines[2]) - 1):
        partial = tmp_path / "scores.jsonl.partial.jsonl"
        partial.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
        assert write(scorer, output, paths, resume=True) == 4
        assert output.read_bytes() == whole
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
def test_a_run_that_never_began_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
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


def test_an_output_that_cannot_be_written_keeps_the_rows(
    scorer: Scorer, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert write(scorer, output, paths, resume=True) == 0
    assert len(output.read_text().splitlines()) == 7


def test_file_names_that_are_not_utf8(scorer: Scorer, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        picture(0).save(os.fsdecode(name), "PNG")
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


def test_a_path_is_no_formula_of_a_spreadsheet(
    scorer: Scorer, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    paths = [f"{sign}1.png" for sign in "=+-@"]
    for path in paths:
        picture(3).save(path, "PNG")
    assert write(scorer, tmp_path / "s.csv", [*paths, "1.png"]) == 5
    assert [row.path for row in read_rows(tmp_path / "s.csv")] == [*(f"./{path}" for path in paths), "1.png"]
    assert write(scorer, tmp_path / "s.csv", [*paths, "1.png"], resume=True) == 0


def test_a_thousand_images_ten_of_them_broken(scorer: Scorer, tmp_path: Path) -> None:
    broken = set(random.Random(0).sample(range(1000), 10))
    content = encoded(picture(0, 8, 8))
    for number in range(1000):
        (tmp_path / f"{number:03}.png").write_bytes(content[:40] if number in broken else content)
    paths = find_images([tmp_path]).paths
    started = time.monotonic()
    output = tmp_path / "scores.csv"
    write(scorer, output, paths)
    assert time.monotonic() - started < 30
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == paths
    assert {number for number, row in enumerate(rows) if row["error"]} == broken
    assert {number for number, row in enumerate(rows) if not row["score"]} == broken
