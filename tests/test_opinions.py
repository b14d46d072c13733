"""Tables of opinions: columns, scales, what is missing, and what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest

from pyiqa_qscorer.data.opinions import (
    MosScale,
    OpinionColumns,
    OpinionRow,
    read_opinion_table,
    read_opinions,
)
from pyiqa_qscorer.errors import OpinionTableError


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_own_and_stated_ranges_spread_and_dmos(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "name,MOS,spread", "a,20,6", "b,60,0", "c,40,10")
    found = read_opinion_table(path, OpinionColumns(std="spread"))
    assert found.mos.tolist() == [1, 5, 3] and found.std == pytest.approx([0.6, 0, 1])
    assert (found.images, found.zero_std, found.missing_std, found.missing_mos) == (3, 1, 0, 0)
    assert (found.scale.low, found.scale.high, found.own_range, found.mos_column) == (20, 60, True, "MOS")
    path = write(tmp_path / "b.csv", "name,dmos,std", "a,0,0.5", "b,75,1")
    columns = OpinionColumns(mos="dmos", std="std", range=(0, 100), std_range=(1, 5), lower_better=True)
    found = read_opinion_table(path, columns)
    assert (found.mos.tolist(), found.std.tolist()) == ([5, 2], [0.5, 1])


def test_missing_values_and_file_names(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv", "name,mos,std", "a,1,0.5", "b,,0.5", "c,none,0.5", "d,inf,1", "e,3,", "f,5,inf", "g,2,0"
    )
    found = read_opinion_table(path, OpinionColumns(std="std"))
    assert found.mos.tolist() == [1, 3, 5, 2] and np.isnan(found.std).tolist() == [False, True, True, False]
    assert (found.images, found.missing_mos, found.missing_std, found.zero_std) == (4, 3, 2, 1)
    assert found.has_std and found.sample(10, only_with_std=True)[0].tolist() == [1, 2]
    assert not read_opinion_table(path).has_std
    path = write(tmp_path / "a.csv", "file,mos,std,ref,split", "007,3,,r.png,a", 'NA,"",1,,a', "x.png,2,1,,b")
    found = read_opinions(path, tmp_path, std_column="std", reference_column="ref", split_column="split", phase="a")
    assert found[0][:2] == (str(tmp_path / "007"), 3) and found[0].reference == str(tmp_path / "r.png")
    assert found[1][0] == str(tmp_path / "NA") and found[1].reference is None
    assert math.isnan(found[0].std or 0) and math.isnan(found[1].mos)
    assert read_opinions(path, tmp_path)[2] == OpinionRow(str(tmp_path / "x.png"), 2)


@pytest.mark.parametrize("total", [1, 40])
def test_votes_give_mos_and_spread_whether_counted_or_shared(tmp_path: Path, total: int) -> None:
    shares = np.array([[0.25, 0.5, 0.25], [0, 0, 1], [0.5, 0, 0.5]])
    rows = [",".join(str(total * share) for share in row) for row in shares]
    path = write(tmp_path / "a.csv", "c1,c2,c3", *rows, "0,0,0", ",1,1")
    found = read_opinion_table(path, OpinionColumns(votes=("c1", "c2", "c3"), range=(1, 3)))
    assert found.mos == pytest.approx([3, 5, 3]) and found.std == pytest.approx([2 * math.sqrt(0.5), 0, 2])
    assert found.vote_shares == pytest.approx([0.25, 0.5 / 3, 1.75 / 3])
    assert found.missing_mos == 2 and found.mos_column is None


def test_a_spread_column_goes_before_votes_and_first_rows_can_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "c1,c2,s", "1,0,0.25", "0,1,0.5")
    assert read_opinion_table(path, OpinionColumns(votes=("c1", "c2"), std="s")).std.tolist() == [1, 2]
    path = write(tmp_path / "b.csv", "mos", "900", "1", "2", "bad", "3")
    found = read_opinion_table(path, OpinionColumns(skip_rows=1))
    assert found.mos.tolist() == [1, 3, 5] and found.missing_mos == 1
    path = write(tmp_path / "c.csv", "mos,std", "1,1", "2,1", "3,-1")
    with pytest.raises(OpinionTableError, match="line 4: std"):  # skipped rows count
        read_opinion_table(path, OpinionColumns(std="std", skip_rows=1))


@pytest.mark.parametrize(
    ("scale", "mos", "score"),
    [
        (MosScale(0, 100), 0, 1),
        (MosScale(0, 100), 100, 5),
        (MosScale(1, 5), 3.25, 3.25),
        (MosScale(0, 100, lower_better=True), 25, 4),
        (MosScale(-3, 1, lower_better=True), 1, 1),
    ],
)
def test_scales_map_to_one_to_five(scale: MosScale, mos: float, score: float) -> None:
    assert scale.map_mos(mos) == pytest.approx(score)
    assert MosScale(0, 100, std_range=(1, 5)).map_std(0.5) == 0.5  # KonIQ-10k
    assert MosScale(0, 100, lower_better=True).map_std(25) == 1


def test_a_sample_is_uniform_without_repetition_and_reproducible(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "mos,std", *(f"{value},1" for value in range(1000)))
    found = read_opinion_table(path, OpinionColumns(std="std", range=(0, 4000)))
    everything = found.sample(1000)[0]
    assert everything.tolist() == found.mos.tolist()
    drawn = found.sample(300, seed=1)[0]
    assert len(np.unique(drawn)) == 300 and sorted(drawn) == sorted(found.sample(300, seed=1)[0])
    assert sorted(drawn) != sorted(found.sample(300, seed=2)[0])
    means = [found.sample(300, seed=seed)[0].mean() for seed in range(40)]
    expected = np.std(everything) / math.sqrt(300) * math.sqrt(0.7)
    assert np.mean(means) == pytest.approx(everything.mean(), abs=4 * expected / math.sqrt(40))
    assert np.std(means) == pytest.approx(expected, rel=0.5)


@pytest.mark.parametrize(
    "columns, message",
    [
        (OpinionColumns(mos="score"), r"has no column 'score'; its columns are name, mos, std, c1, c2"),
        (OpinionColumns(std="spread"), "has no column 'spread'"),
        (OpinionColumns(range=(0, 3)), r"MOS go from 1.0 to 4.0, outside the stated range \(0, 3\)"),
        (OpinionColumns(range=(3, 0)), "--range must be LOW HIGH"),
        (OpinionColumns(std_range=(0, math.inf)), "--std-range must be LOW HIGH"),
        (OpinionColumns(skip_rows=-1), "--skip-rows must be >= 0"),
        (OpinionColumns(skip_rows=3), "no usable MOS"),
        (OpinionColumns(skip_rows=2), "every MOS is 4.0; state the range"),
        (OpinionColumns(mos="mos", votes=("c1", "c2")), "give either --mos-column or --vote-columns"),
        (OpinionColumns(votes=("c1",)), "two or more different columns, got c1"),
        (OpinionColumns(votes=("c1", "c1")), "two or more different columns"),
        (OpinionColumns(votes=("c1", "c2")), "line 3: c2 must be >= 0, got -2"),
        (OpinionColumns(std="std"), "line 4: std must be >= 0, got -0.5"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, columns: OpinionColumns, message: str) -> None:
    path = write(tmp_path / "a.csv", "name,mos,std,c1,c2", "a,1,1,1,1", "b,2,1,1,-2", "c,4,-0.5,1,1")
    with pytest.raises(OpinionTableError, match=message):
        read_opinion_table(path, columns)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    contents = ["mos\n1\n2,3\n", "name,mos\na,1,9\nb,2,9\n", "name,mos\na,1,9\nb,2\n", b"mos\n\xff\xfe\n", b"", None]
    path = tmp_path / "a.csv"
    for content in contents:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(OpinionTableError, match="cannot be read"):
            read_opinion_table(path)
    with pytest.raises(OpinionTableError, match=r"say with --mos-column which column of .* is the MOS: name, dmos"):
        read_opinion_table(write(tmp_path / "b.csv", "name,dmos", "a,1"))
    path.write_bytes(b"\xef\xbb\xbfmos\r\n1\r\n2\r\n")  # a byte order mark is no part of the first column
    assert read_opinion_table(path).mos.tolist() == [1, 5]
