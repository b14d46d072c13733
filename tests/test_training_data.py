"""Training data: scales, splits, mixing, determinism, and bad rows."""

import csv
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import make_pictures

from pyiqa_qscorer.data.opinions import MosScale
from pyiqa_qscorer.errors import TrainingDataError
from pyiqa_qscorer.images.model_images import SquareImages
from pyiqa_qscorer.training.batches import Collator, MixedSampler
from pyiqa_qscorer.training.dataset import LabelledImage, LabelledImages, QualityDataset, read_dataset, refuse_overlap
from pyiqa_qscorer.training.dataset_config import FolderDataset
from pyiqa_qscorer.training.text import training_text
from pyiqa_qscorer.training.tokenizer import prompt_tokenizer


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures", 8)


def own(pictures: Path, **changes: Any) -> FolderDataset:
    fields = {"folder": pictures, "csv": pictures / "labels.csv", "mos_range": (0, 100), **changes}
    return FolderDataset.model_validate(fields)


def rewrite(pictures: Path, row: int, column: str, value: str) -> None:
    with (pictures / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[row][column] = value
    with (pictures / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_own_folder_and_overlap(pictures: Path) -> None:
    part = read_dataset(own(pictures, std_column="std", split_column="split"), "train")
    assert [Path(image.path).stem for image in part.images] == ["00", "01", "02", "04", "05", "06"]
    assert part.images[0].mos == pytest.approx(1 + 4 * 0.05) and part.images[0].std == pytest.approx(0.32)
    assert read_dataset(own(pictures), "train").images[0].std is None
    assert len(read_dataset(own(pictures, split_column="split"), "val").images) == 2
    part, other = read_dataset(own(pictures), "train"), pictures.parent / "link"
    other.symlink_to(pictures)
    linked = [dataclasses.replace(image, path=str(other / Path(image.path).name)) for image in part.images]
    for same in (part, dataclasses.replace(part, images=linked)):
        with pytest.raises(TrainingDataError, match="8 images are in both"):
            refuse_overlap([part], [same])


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("mos", "", "MOS is missing"),
        ("mos", "much", "MOS is missing"),
        ("mos", "101", r"outside the stated range \[0.0, 100.0\]"),
        ("file", "none.png", "image is missing"),
        ("std", "-1", "not a number >= 0"),
    ],
)
def test_a_bad_row_stops_or_is_counted(pictures: Path, column: str, value: str, words: str) -> None:
    rewrite(pictures, 3, column, value)
    config = own(pictures, std_column="std")
    with pytest.raises(TrainingDataError, match=words) as error:
        read_dataset(config, "train")
    assert ("none.png" if column == "file" else "03.png") in str(error.value)
    part = read_dataset(config, "train", on_error="skip")
    assert len(part.images) == 7 and len(part.skipped) == 1


def test_a_broken_image_stops_or_is_counted(pictures: Path) -> None:
    content = (pictures / "02.png").read_bytes()
    (pictures / "02.png").write_bytes(content[: len(content) // 2])
    part = read_dataset(own(pictures), "train")
    with pytest.raises(TrainingDataError, match=r"02\.png"):
        QualityDataset([part], SquareImages(56).sample)[2]
    skipping = read_dataset(own(pictures), "train", on_error="skip")
    assert [Path(path).name for path, _ in skipping.skipped] == ["02.png"]
    assert all(QualityDataset([skipping], SquareImages(56).sample)[index]["mos"] for index in range(7))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mos_column": "score"}, "mos_column 'score' is not in .* file, mos, std, split"),
        ({"split_column": "fold"}, "split_column 'fold'"),
        ({"csv": Path("missing.csv")}, "cannot be read"),
        ({"split_column": "split"}, "no usable image for phase 'test'"),
        ({}, "standard deviation is missing, which the objective needs"),
    ],
)
def test_bad_tables(pictures: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingDataError, match=words):
        read_dataset(own(pictures, **changes), "test", needs_std=True)


def fake(name: str, count: int, weight: float) -> LabelledImages:
    images = [LabelledImage(f"{name}{index}", 3.0, None, name) for index in range(count)]
    return LabelledImages(name, images, MosScale(1, 5), weight)


@pytest.mark.parametrize(("weight", "low", "high"), [(1, 1, 1), (2, 2, 2), (2.5, 2, 3), (0.2, 0, 1)])
def test_weights_decide_how_often_an_image_comes(weight: float, low: int, high: int) -> None:
    sampler = MixedSampler([fake("a", 10, 1.0), fake("b", 20, weight)], seed=1)
    seen = Counter(index for index, _ in sampler)
    assert sum(seen.values()) == len(sampler) == 10 + 20 * weight
    assert all(seen[index] == 1 for index in range(10))
    assert {seen[index] for index in range(10, 30)} == ({low, high} if low != high else {low})


def test_order_flips_and_questions_are_functions_of_seed_and_epoch(pictures: Path) -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = MixedSampler([fake("a", 30, 1.0)], seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert [index for index, _ in order(0, 0)] != [index for index, _ in order(0, 1)]
    assert [index for index, _ in order(0, 0)] != [index for index, _ in order(1, 0)]
    assert {epoch for _, epoch in order(0, 3)} == {3}
    data = QualityDataset([read_dataset(own(pictures), "train")], SquareImages(56).sample, texts=3, flip=True, seed=5)
    first, again = data[(2, 0)], data[(2, 0)]
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    plain = QualityDataset([read_dataset(own(pictures), "train")], SquareImages(56).sample)[2]["pixel_values"]
    mirrored = {}
    for epoch in range(12):
        pixels = data[(2, epoch)]["pixel_values"]
        assert torch.equal(pixels, plain) or torch.equal(pixels.flip(-1), plain)
        mirrored[epoch] = not torch.equal(pixels, plain)
    assert set(mirrored.values()) == {True, False}
    assert {data[(2, epoch)]["text"] for epoch in range(12)} == {0, 1, 2}


@pytest.mark.parametrize("count", [1, 5])
def test_batches_name_the_interval_of_the_mos(pictures: Path, count: int) -> None:
    tokenizer, names = prompt_tokenizer(), [f"<score{index + 1}>" for index in range(count)]
    tokenizer.add_tokens(names, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(names)
    collator = Collator([training_text(tokenizer, "training", "<score1>")], ids)
    data = QualityDataset([read_dataset(own(pictures), "train")], SquareImages(56).sample)
    batch = collator([data[index] for index in range(8)])
    assert batch["pixel_values"].shape == (8, 3, 56, 56) and torch.isnan(batch["mos_std"]).all()
    named = [ids.index(int(token)) for token in batch["labels"][:, -3]]
    assert named == [min(int((mos - 1) / 4 * count), count - 1) for mos in batch["mos"].tolist()]
