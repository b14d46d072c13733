"""The study of a dataset, its report, and the numbers known of real datasets."""

import csv
import dataclasses
import html
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy import stats

from pyiqa_qscorer.analysis import error_report as report_module
from pyiqa_qscorer.analysis import study as study_module
from pyiqa_qscorer.analysis.error_report import as_json, conclusions, facts, more_tables, tables, write_report
from pyiqa_qscorer.analysis.figures import error_against_levels
from pyiqa_qscorer.analysis.study import ErrorRow, Study, study
from pyiqa_qscorer.data.labels import level_centers, one_hot, restore
from pyiqa_qscorer.data.opinions import OpinionColumns, read_opinion_table
from pyiqa_qscorer.errors import QScorerError
from pyiqa_qscorer.report import NONE

RNG = np.random.default_rng(0)
MOS = np.concatenate([[0.0, 100.0], 100 * RNG.beta(3, 2, 598)])
STD = np.concatenate([[0.0, 0.0], RNG.uniform(8, 25, 598)])
PICTURES = ["error_against_levels", "error_against_mos", "label_histograms", "noise", "rank_ceilings"]


def table(path: Path, std: bool = True) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "mos", *(["std"] if std else [])])
        for number, (mos, spread) in enumerate(zip(MOS, STD, strict=True)):
            writer.writerow([number, mos, *([spread] if std else [])])
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Study:
    path = table(tmp_path_factory.mktemp("table") / "labels.csv")
    return study(read_opinion_table(path, OpinionColumns(std="std", range=(0, 100))), [2, 5, 10])


@pytest.fixture
def one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """For reports whose pictures do not matter."""
    monkeypatch.setattr(report_module, "all_figures", lambda *_: {"empty": (Figure(figsize=(1, 1)), "nothing")})


def by_scipy(scores: np.ndarray, mos: np.ndarray) -> tuple[float, float, float]:
    pair = scores.round(9), mos.round(9)  # else one MOS written in two ways is two
    return stats.spearmanr(*pair)[0], stats.pearsonr(*pair)[0], stats.kendalltau(*pair)[0]


def row(found: Study, label: str, values: str, levels: int | None) -> ErrorRow:
    one = found.row(label, values, levels)
    assert one is not None
    return one


@pytest.mark.parametrize("levels", [2, 5, 10])
@pytest.mark.parametrize("kind", ["integers", "interval_centers"])
def test_a_row_is_what_the_whole_array_gives(found: Study, levels: int, kind: str) -> None:
    mos = 1 + MOS / 25
    restored = restore(one_hot(mos, levels), level_centers(levels, kind=kind))  # type: ignore[arg-type]
    error, one = restored - mos, row(found, "one_hot", kind, levels)
    expected = {
        "images": len(mos),
        "mae": np.abs(error).mean(),
        "rmse": math.sqrt(np.mean(error**2)),
        "bias": error.mean(),
        "max_error": np.abs(error).max(),
        "mae_standard_error": 0.0,
        **dict(zip(("srcc", "plcc", "krcc"), by_scipy(restored, mos), strict=True)),
    }
    assert {name: getattr(one, name) for name in expected} == pytest.approx(expected, abs=1e-9)
    assert one.label_part + one.restoration_part + one.cross_term == pytest.approx(one.mse, abs=1e-12)


def test_score_tokens_lose_rounding_and_nothing_else(found: Study) -> None:
    one = row(found, "score_token", "float16", None)
    assert 0 < one.mae < 1e-3 and one.label_part == 0
    assert one.mae == pytest.approx(one.uniform_mae, rel=0.3)
    assert row(found, "linear", "integers", 5).max_error < 1e-12
    mos = 1 + MOS / 25  # and leaked mass is a bias towards zero
    restored = restore(one_hot(mos, 5), level_centers(5))
    for one in found.leaks[:4]:
        assert one.label == "one_hot" and one.mae == pytest.approx(np.mean(np.abs((1 - one.share) * restored - mos)))


@pytest.mark.usefixtures("one_picture")
def test_without_spreads_there_are_no_gaussian_labels_and_names_are_escaped(tmp_path: Path) -> None:
    found = study(read_opinion_table(table(tmp_path / "<b>&.csv", std=False)), [5])
    assert {one.label for one in found.rows} == {"one_hot", "linear", "score_token"}
    assert dict(facts(found))["spread of opinions"].startswith("none, so no Gaussian labels")
    assert "pdf adjusted" not in tables(found)[2].columns
    text = write_report(tmp_path / "report", found).read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;.csv" in text and "<b>" not in text


def test_large_tables_are_sampled_for_soft_labels_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = study(read_opinion_table(table(tmp_path / "a.csv"), OpinionColumns(std="std")), [5])
    monkeypatch.setattr(study_module, "SAMPLE", 150)
    sampled = study(read_opinion_table(tmp_path / "a.csv", OpinionColumns(std="std")), [5])
    for kind in ("integers", "interval_centers", "optimal"):
        first, second = (dataclasses.astuple(row(one, "one_hot", kind, 5))[3:] for one in (whole, sampled))
        assert second == pytest.approx(first, abs=1e-9)
    one = row(sampled, "gaussian_pdf_raw", "integers", 5)
    assert one.images == 150 and 0 < one.mae_standard_error < 0.1
    assert one.mae == pytest.approx(row(whole, "gaussian_pdf_raw", "integers", 5).mae, abs=4 * one.mae_standard_error)
    assert "150 images drawn at random" in dict(facts(sampled))["sample"]


def test_report_has_every_number_and_needs_nothing_else(found: Study, tmp_path: Path) -> None:
    page = write_report(tmp_path / "new" / "report", found)
    folder = page.parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["errors.csv", "errors.html", "errors.json", *(f"{name}.png" for name in PICTURES)]
    )
    with (folder / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(one["mae"]) for one in rows] == [one.mae for one in found.rows]
    content = json.loads((folder / "errors.json").read_text())
    assert content == json.loads(json.dumps(as_json(found)))
    assert content["errors"][0]["mae"] == found.rows[0].mae and content["dataset"]["zero_std"] == 2
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|<link|src=\"(?!data:)", text)
    assert "width=device-width" in text and all(html.escape(sentence) in text for sentence in conclusions(found))
    assert text.count("data:image/png;base64,") == len(PICTURES)
    for one in [*tables(found), *more_tables(found)]:
        assert all(len(cells) == len(one.columns) for cells in one.rows)
    for name in PICTURES:
        assert imread(folder / f"{name}.png")[..., :3].std() > 0.02
    [axis] = error_against_levels(found).axes  # no point falls off the logarithmic axis
    shown = np.concatenate([line.get_ydata() for line in axis.lines])
    assert axis.get_ylim()[0] < np.nanmin(shown) and np.nanmax(shown) < axis.get_ylim()[1]


def test_undefined_numbers_and_computed_conclusions(found: Study, tmp_path: Path) -> None:
    first, second, third = conclusions(found)
    one = row(found, "one_hot", "integers", 5)
    assert f"errs by {one.mae:.3f} on average" in first and f"SRCC is {one.srcc:.3f} at best" in first
    assert f"{row(found, 'one_hot', 'optimal', 5).mae:.4f}, a soft label" in second
    assert (row(found, "one_hot", "integers", 10).srcc >= 0.99) == ("10 is the first that allows" in third)
    no = dataclasses.replace(found, rows=[one for one in found.rows if one.levels != 10])
    assert conclusions(no)[2] == "No number of levels tried (up to 5) allows an SRCC of 0.99."
    path = tmp_path / "same.csv"
    path.write_text("mos\n3\n3\n3\n")
    found = study(read_opinion_table(path, OpinionColumns(range=(1, 5))), [5])
    content = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert content["errors"][0]["srcc"] is None and tables(found)[0].rows[0][-3:] == (NONE, NONE, NONE)
    assert "SRCC is" not in conclusions(found)[0]
    write_report(tmp_path / "report", found)


@pytest.mark.usefixtures("one_picture")
def test_a_report_that_cannot_be_finished_leaves_whole_files(found, tmp_path, monkeypatch) -> None:
    write_report(tmp_path, found)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(QScorerError, match=r"cannot write .*errors\.csv: No space left"):
        write_report(tmp_path, found)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def real(shared: Path, name: str, levels: tuple[int, ...] = (5,), **columns: object) -> Study:
    path = shared / "data" / "labels" / name
    return study(read_opinion_table(path, OpinionColumns(**columns)), levels)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def koniq(shared: Path) -> Study:
    votes = ("c1", "c2", "c3", "c4", "c5")
    return real(shared, "meta_info_KonIQ10kDataset.csv", (5, 10, 20), std="std", votes=votes)


def test_koniq(koniq: Study) -> None:
    for label, values, expected in (
        ("one_hot", "integers", 0.303),
        ("one_hot", "interval_centers", 0.206),
        ("gaussian_pdf_raw", "integers", 0.063),
        ("gaussian_pdf", "integers", 0.008),
        ("linear", "integers", 0.0),
    ):
        one = row(koniq, label, values, 5)
        assert one.images == 10_073 and one.mae == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("levels, srcc, krcc", [(5, 0.9307, 0.8194), (10, 0.9803, 0.9054), (20, 0.9948, 0.9527)])
def test_koniq_ceilings_are_scipys(koniq: Study, levels: int, srcc: float, krcc: float) -> None:
    one = row(koniq, "one_hot", "integers", levels)
    mos, _ = koniq.sample
    expected = by_scipy(restore(one_hot(mos, levels), level_centers(levels)), mos)
    assert (one.srcc, one.plcc, one.krcc) == pytest.approx(expected, abs=1e-6)
    assert (one.srcc, one.krcc) == pytest.approx((srcc, krcc), abs=1e-4) and one.srcc < koniq.bounds[levels][0]


@pytest.mark.parametrize(
    "name, columns, expected",
    [
        ("meta_info_KADID10kDataset.csv", {"mos": "dmos", "std": "std"}, 0.326),
        ("meta_info_SPAQDataset.csv", {}, 0.299),
        ("meta_info_LIVEChallengeDataset.csv", {"std": "std", "skip_rows": 7}, 0.303),
        ("agiqa3k.csv", {"mos": "mos_quality", "std": "std_quality"}, 0.305),
    ],
)
def test_one_hot_on_other_datasets(shared: Path, name: str, columns: dict[str, object], expected: float) -> None:
    found = real(shared, name, **columns)
    assert row(found, "one_hot", "integers", 5).mae == pytest.approx(expected, abs=1e-3)
    if name.startswith("meta_info_KADID"):
        assert found.opinions.zero_std == 2
