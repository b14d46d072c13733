"""Datasets that pyiqa knows by name, read by pyiqa's own loader from folders in its layout."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pyiqa_qscorer.errors import QScorerError
from pyiqa_qscorer.host.pyiqa_datasets import pyiqa_dataset
from pyiqa_qscorer.training.dataset import read_dataset
from pyiqa_qscorer.training.dataset_config import PyiqaDataset


def write(root: Path, table: str, header: list[str], rows: list[list[Any]], images: list[str]) -> None:
    for name in images:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(path)
    (root / "meta_info").mkdir(exist_ok=True)
    with (root / "meta_info" / table).open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """KonIQ-10k (MOS of 0..100, standard deviations on 1..5) and LIVE (lower is better, references beside)."""
    names = [f"{index}.jpg" for index in range(6)]
    splits = ["train", "train", "train", "val", "test", "test"]
    rows = [[name, 10 + 15 * index, 0.5, split] for index, (name, split) in enumerate(zip(names, splits, strict=True))]
    koniq = [f"koniq10k/512x384/{name}" for name in names]
    write(tmp_path, "meta_info_KonIQ10kDataset.csv", ["img_name", "mos", "std", "official_split"], rows, koniq)
    live = [["refimgs/a.bmp", f"jpeg/img{index}.bmp", 25.75 * index + 1, 4.95] for index in range(3)]
    pictures = [f"LIVEIQA_release2/{name}" for row in live for name in row[:2]]
    write(tmp_path, "meta_info_LIVEIQADataset.csv", ["ref_name", "dist_name", "mos", "std"], live, pictures)
    return tmp_path


def read(root: Path, phase: str = "train", **fields: Any) -> Any:
    config = PyiqaDataset.model_validate({"data_root": root, **fields})
    return read_dataset(config, phase)


@pytest.mark.parametrize(("phase", "numbers"), [("train", [0, 1, 2]), ("val", [3]), ("test", [4, 5])])
def test_split_scale_and_spread(root: Path, phase: str, numbers: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    part = read(root, phase, dataset="koniq10k", split="official_split")
    assert [int(Path(image.path).stem) for image in part.images] == numbers
    # pyiqa states 1..100 for this one; the spread is on 1..5 already.
    expected = [1 + 4 * (10 + 15 * number - 1) / 99 for number in numbers]
    assert [image.mos for image in part.images] == pytest.approx(expected)
    assert {image.std for image in part.images} == {0.5}
    assert capsys.readouterr().out == ""  # pyiqa prints; our output stays clean
    own = read(root, dataset="koniq10k", split="official_split", mos_range=[0, 100])
    assert own.images[0].mos == pytest.approx(1.4)  # goes over the stated range


def test_lower_better_references_and_repeated_names(root: Path) -> None:
    part = read(root, dataset="live")
    assert [Path(image.path).name for image in part.images] == ["img0.bmp", "img1.bmp", "img2.bmp"]
    assert [image.mos for image in part.images] == pytest.approx([5, 5 - 4 * 25.75 / 99, 5 - 4 * 51.5 / 99])
    assert part.images[0].std == pytest.approx(4 * 4.95 / 99) and part.scale.lower_better
    rows = [["refimgs/a.bmp", f"{folder}/img1.bmp", 20, std] for folder, std in (("jp2k", 3.0), ("jpeg", 7.0))]
    header = ["ref_name", "dist_name", "mos", "std"]
    write(root, "meta_info_LIVEIQADataset.csv", header, rows, [f"LIVEIQA_release2/{row[1]}" for row in rows])
    found, _ = pyiqa_dataset("live", root, {})
    assert [row.std for row in found] == [3.0, 7.0]
    assert {Path(row.reference or "") for row in found} == {root / "LIVEIQA_release2/refimgs/a.bmp"}


def test_transform_and_unknown_names(root: Path) -> None:
    with pytest.raises(QScorerError, match=r"meta_info_SPAQDataset\.csv is missing; .*data_root.*download: true"):
        read(root, dataset="spaq")
    write(root, "meta_info_SPAQDataset.csv", ["name", "mos"], [["1.jpg", 50]], ["SPAQ/TestImage/1.jpg"])
    [row], info = pyiqa_dataset("spaq", root, {"phase": "test"})
    [resized] = info["transform"]([Image.new("RGB", (896, 600))])
    assert row.reference is None and min(resized.size) == 448
    assert "transform" not in pyiqa_dataset("live", root, {})[1]
    with pytest.raises(QScorerError, match=r"no dataset 'koniq'; did you mean .*koniq10k"):
        read(root, dataset="koniq")
    with pytest.raises(QScorerError, match="split"):
        read(root, dataset="koniq10k", split="my_split")
