"""Scoring datasets into tables: every failure stays with its image, nothing is scored twice, numbers stand on them."""

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_world import FakeMetric, FakeMetrics, picture, write_csv, write_dataset

from pyiqa_qscorer.data.score_rows import read_rows
from pyiqa_qscorer.errors import InputError, QScorerError
from pyiqa_qscorer.evaluation import cost
from pyiqa_qscorer.evaluation.correlation import correlations
from pyiqa_qscorer.evaluation.datasets import DatasetSpec, OpenDataset, open_dataset
from pyiqa_qscorer.evaluation.results import Entry, read_leaderboard
from pyiqa_qscorer.evaluation.runner import MetricSpec, Problem, run_benchmark
from pyiqa_qscorer.evaluation.scoring import BenchmarkRow

LEVELS = range(40, 220, 9)


def opened(table: Path, label: str = "own", **fields: Any) -> OpenDataset:
    return open_dataset(DatasetSpec(label, csv=table, images=table.parent / "images", **fields))


@pytest.fixture(autouse=True)
def metrics(monkeypatch: pytest.MonkeyPatch) -> FakeMetrics:
    return FakeMetrics().install(monkeypatch.setattr)


def run(output: Path, dataset: OpenDataset, *names: str, **settings: Any) -> list[Problem]:
    specs = [MetricSpec(name, name, settings.pop("options", {})) for name in names]
    return run_benchmark(specs, [dataset], output, "cpu", **settings)


def entry(output: Path, metric: str) -> Entry:
    return next(one for one in read_leaderboard(output, resamples=50).entries if one.metric == metric)


def rows(output: Path, metric: str, dataset: str = "own") -> list[BenchmarkRow]:
    return read_rows(output / "scores" / dataset / f"{metric}.csv", BenchmarkRow)


def without_time(table: list[BenchmarkRow]) -> list[BenchmarkRow]:
    return [dataclasses.replace(row, seconds=None) for row in table]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", LEVELS)


def test_tables_hold_what_was_seen(table: Path, tmp_path: Path, metrics: FakeMetrics) -> None:
    assert run(tmp_path / "out", opened(table), "brightness", "darkness") == []
    metrics.batches.clear()
    run(tmp_path / "together", opened(table), "brightness", batch_size=8)
    assert metrics.batches == [8, 8, 4]
    found = rows(tmp_path / "out", "brightness")
    assert [Path(row.path).name for row in found] == [f"{index:04}.png" for index in range(len(LEVELS))]
    assert found[3].score == pytest.approx(67 / 255, abs=0.01) and found[3].mos == pytest.approx(67 / 50 + 0.5)
    assert (found[3].width, found[3].height) == (24, 20) and found[3].seconds is not None and found[3].error is None
    facts = json.loads((tmp_path / "out/scores/own/brightness.json").read_text())
    assert (facts["processor"], facts["cores"]) == (platform.processor() or platform.machine(), os.cpu_count())
    assert facts["threads"] == torch.get_num_threads()
    assert facts["identity"] == "brightness-1" and facts["versions"] == {"fake": "1"} and facts["batch_size"] == 1
    # Lower is better for the second: turned, it is as good as its negative.
    bright, dark = entry(tmp_path / "out", "brightness").agreement, entry(tmp_path / "out", "darkness").agreement
    expected = correlations([row.score for row in found], [row.mos for row in found])
    assert bright == expected and bright.images == len(LEVELS) and bright.srcc > 0.9
    assert (dark.srcc, dark.krcc) == (-bright.srcc, -bright.krcc)
    run(tmp_path / "dmos", opened(table, lower_better=True), "brightness", "darkness")  # opinions turned as well
    bright, dark = (entry(tmp_path / "dmos", name).agreement.srcc for name in ("brightness", "darkness"))
    assert dark == -bright > 0.9


def test_a_thousand_images_of_many_sizes_with_ten_broken_ones(tmp_path: Path, metrics: FakeMetrics) -> None:
    sizes = [(16, 12), (12, 16), (20, 20), (9, 31), (31, 9)]
    table = write_dataset(tmp_path / "data", [40 + index % 180 for index in range(1000)], sizes=sizes)
    images = table.parent / "images"
    for number in range(10):
        path = images / f"{number * 97:04}.png"
        path.write_bytes(path.read_bytes()[: 40 * (number % 2)])  # empty or cut off
    assert run(tmp_path / "out", opened(table), "brightness", batch_size=8) == []
    found = entry(tmp_path / "out", "brightness")
    assert len(found.rows) == 1000 and len(found.scored) == found.agreement.images == 990
    assert sum(count for _, count in found.failures) == 10
    assert {Path(row.path).name for row in found.rows if row.error} == {f"{number * 97:04}.png" for number in range(10)}
    metrics.takes_batches = False  # as pyiqa's metrics
    metrics.batches.clear()
    run(tmp_path / "alone", opened(table), "brightness", batch_size=8)
    assert set(metrics.batches) == {1}
    scores = [[row.score for row in rows(tmp_path / name, "brightness")] for name in ("out", "alone")]
    assert scores[0] == scores[1]


def test_failures_of_a_metric_stay_with_their_images(table: Path, tmp_path: Path) -> None:
    problems = run(tmp_path / "out", opened(table), "broken", "picky", "undefined", "constant", batch_size=4)
    assert problems == [Problem("broken", "own", "cannot be built: OSError: the weights are gone")]
    bright = sum(level / 255 > 0.6 for level in LEVELS)
    picky, undefined = entry(tmp_path / "out", "picky"), entry(tmp_path / "out", "undefined")
    assert picky.failures == [("RuntimeError: too bright for me", bright)]
    assert picky.agreement.images == len(LEVELS) - bright
    dark = sum(level / 255 < 0.3 for level in LEVELS)
    assert undefined.failures == [("its score is nan", dark)] and undefined.agreement.images == len(LEVELS) - dark
    constant = entry(tmp_path / "out", "constant")
    assert constant.agreement.srcc is None and constant.problem == "all 20 scores are 3"
    assert entry(tmp_path / "out", "broken").problem == problems[0].reason


def test_references(tmp_path: Path, metrics: FakeMetrics) -> None:
    table = write_dataset(tmp_path / "data", LEVELS, sizes=[(24, 20), (12, 10)], references=True)
    picture(60, (5, 5)).save(table.parent / "images/0002.png")
    run(tmp_path / "out", opened(table), "distance", "brightness", batch_size=3)
    found = entry(tmp_path / "out", "distance")
    assert found.agreement.srcc > 0.9
    assert found.failures == [("the image is 5x5, its reference 24x20: a full-reference metric needs one size", 1)]
    assert rows(tmp_path / "out", "brightness")[0].reference is None
    # Another reference: scored again, and only what it belongs to.
    metrics.batches.clear()
    picture(200, (12, 10)).save(table.parent / "images/ref_12.png")
    run(tmp_path / "out", opened(table), "distance")
    assert sum(metrics.batches) == len(LEVELS) // 2


def test_full_reference_metrics_need_references(table: Path, tmp_path: Path) -> None:
    problems = run(tmp_path / "out", opened(table), "distance", "brightness")
    assert problems == [Problem("distance", "own", "dataset own names no reference images")]
    listed = write_dataset(tmp_path / "more", [60, 90, 120], references=True)
    for path in (listed.parent / "images").glob("ref*"):
        path.unlink()
    [problem] = run(tmp_path / "out", opened(listed), "distance")
    assert "none of its reference images exists" in problem.reason


def test_a_second_run_scores_only_what_is_new_changed_or_failed(table, tmp_path, metrics) -> None:
    output, dataset = tmp_path / "out", opened(table)
    run(output, dataset, "picky")
    before = rows(output, "picky")
    failed = sum(row.score is None for row in before)
    metrics.batches.clear()
    run(output, dataset, "picky")
    assert sum(metrics.batches) == failed and without_time(rows(output, "picky")) == without_time(before)
    changed = table.parent / "images/0001.png"
    picture(77).save(changed)
    os.utime(changed, ns=(1, 1))
    write_csv(table, [["file", "mos"], *[[f"{index:04}.png", 9 - index] for index in range(10)]])
    metrics.batches.clear()
    run(output, opened(table), "picky")
    assert sum(metrics.batches) == 1
    found = entry(output, "picky")  # the opinions of today, of the images that are in the dataset today
    assert [row.mos for row in sorted(found.rows, key=lambda row: row.path)] == [9 - index for index in range(10)]
    metrics.batches.clear()
    run(output, opened(table), "picky", overwrite=True)
    assert sum(metrics.batches) == 10 == len(rows(output, "picky"))


class HungryMetrics(FakeMetrics):
    """Take 1 MB per pixel of an image's width; 40 MB stay for good when a metric is built."""

    def build(self, name: str, device: torch.device, options: dict[str, Any]) -> FakeMetric:
        metric = super().build(name, device, options)
        metric.weights = np.ones(40_000_000, np.uint8)
        score = metric.score
        metric.score = lambda images, references: score(images, references) if use(images[0].shape[-1]) else []
        return metric


def use(megabytes: int) -> bool:
    return bool(np.ones(megabytes * 1_000_000, np.uint8).any())


def test_peak_memory_is_that_of_each_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cost.PeakMemory(torch.device("cpu")).bytes() is None:
        pytest.skip("the peak of the resident memory cannot be reset here")
    datasets = [
        opened(write_dataset(tmp_path / label, LEVELS[:3], sizes=[(width, 8)]), label)
        for label, width in (("large", 400), ("small", 10))
    ]
    HungryMetrics().install(monkeypatch.setattr)
    run_benchmark([MetricSpec("brightness", "brightness")], datasets, tmp_path / "out", "cpu")
    peaks = [
        json.loads((tmp_path / f"out/scores/{label}/brightness.json").read_text())["peak_memory_bytes"] / 1e6
        for label in ("large", "small")
    ]
    assert 380 < peaks[0] < 600 and 0 <= peaks[1] < 200  # less than was taken, where freed memory was at hand


def test_scores_of_other_weights_are_not_mixed(table: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", opened(table), "brightness")
    with pytest.raises(InputError, match=r"another checkpoint or other options.*--overwrite"):
        run(tmp_path / "out", opened(table), "brightness", options={"version": 2})


def test_significance_marks_only_what_is_beyond_chance(table: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", opened(table), "brightness", "darkness", "undefined", "constant")
    board = read_leaderboard(tmp_path / "out", resamples=300)
    by_name = {one.metric: one for one in board.of("own")}
    assert board.metrics[-1] == "constant" and board.of("own")[-1].metric == "constant"
    assert by_name["brightness"].better_than == ["darkness"] and by_name["brightness"].not_worse_than_best
    assert not by_name["darkness"].not_worse_than_best and not by_name["constant"].not_worse_than_best
    pairs = {frozenset((pair.first, pair.second)): pair for pair in board.pairs}
    same = pairs[frozenset(("brightness", "undefined"))]  # equal scores on the images that both have
    assert same.difference == 0 and same.p == 1 and same.better is None
    assert same.images == len(by_name["undefined"].scored) < len(LEVELS)
    assert len(pairs) == 3 and not any("constant" in pair for pair in pairs)
    assert read_leaderboard(tmp_path / "out", resamples=300).pairs == board.pairs


def test_labels(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two metrics are called 'brightness'"):
        run(tmp_path / "out", opened(table), "brightness", "brightness")
    again = write_dataset(tmp_path / "more", LEVELS)
    with pytest.raises(InputError, match=r"two datasets are called 'own': .* NEWNAME=.*more/opinions\.csv$"):
        run_benchmark([MetricSpec("m", "brightness")], [opened(table), opened(again)], tmp_path / "out", "cpu")
    with pytest.raises(InputError, match=r"dataset 'a/b' cannot name a file"):
        run(tmp_path / "out", opened(table, "a/b"), "brightness")
    with pytest.raises(QScorerError, match="did you mean 'brightness'"):
        run(tmp_path / "out", opened(table), "brightnes")
    with pytest.raises(InputError, match="holds no results"):
        read_leaderboard(tmp_path / "out")


def test_duplicates_columns_and_splits(table: Path, tmp_path: Path) -> None:
    write_csv(table, [["file", "mos"], ["0000.png", 1], ["./0000.png", 1], ["0001.png", ""], ["0002.png", 2]])
    dataset = opened(table)
    assert [Path(row.path).name for row in dataset.rows] == ["0000.png", "0002.png"]
    assert len(dataset.notes) == 2 and "1 rows without MOS" in dataset.notes[0] and "repeat" in dataset.notes[1]
    write_csv(table, [["file", "mos"], ["0000.png", 1], ["0000.png", 2]])
    with pytest.raises(QScorerError, match=r"0000\.png stands twice, with MOS 1 .* and 2"):
        opened(table)
    # The same name in two folders is two images.
    for folder, level in (("a", 60), ("b", 90)):
        (table.parent / "images" / folder).mkdir()
        picture(level).save(table.parent / "images" / folder / "1.png")
    write_csv(table, [["file", "mos"], ["a/1.png", 1], ["b/1.png", 2]])
    run(tmp_path / "out", opened(table), "brightness")
    assert len({row.score for row in rows(tmp_path / "out", "brightness")}) == 2
    header = ["ref_name", "dist_name", "dmos", "part"]
    write_csv(table, [header, ["0003.png", "0000.png", 1, "train"], ["0003.png", "0001.png", 2, "test"]])
    dataset = opened(table, columns={"split": "part"}, phase="test", lower_better=True)
    assert [(Path(row.path).name, row.mos, Path(row.reference or "").name) for row in dataset.rows] == [
        ("0001.png", 2.0, "0003.png")
    ]
    assert dataset.facts["lower_better"] and dataset.missing_references() is None
