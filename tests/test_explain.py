"""Maps of where the quality is low: geometry, planted damage, inputs of every kind, the command's files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from pyiqa_qscorer import ImageError, Scorer
from pyiqa_qscorer.cli.app import app
from pyiqa_qscorer.images.region_map import CELLS, RegionMap, crop_boxes, region_map

PHOTOS = Path(__file__).parent / "photos"


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer("qscorer-mini", device="cpu")


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(2, 7))
def test_crops_cover_the_picture(width: int, height: int, per_side: int) -> None:
    boxes = crop_boxes(width, height, per_side, 1 / 2)
    assert len(boxes) == per_side**2
    assert all(0 <= left < right <= width and 0 <= top < bottom <= height for left, top, right, bottom in boxes)
    assert boxes[0][:2] == (0, 0) and boxes[-1][2:] == (width, height)
    assert len({(right - left, bottom - top) for left, top, right, bottom in boxes}) == 1
    if min(width, height) >= CELLS:
        values = region_map(1.0, boxes, np.full(len(boxes), 2.5), (width, height)).values
        assert values.shape == (CELLS, CELLS) and (values == 2.5).all()


def test_a_low_crop_shows_where_it_lies() -> None:
    boxes = crop_boxes(600, 300)
    scores = np.full(25, 4.0)
    scores[9] = 1.0  # second row, last column
    found = region_map(3.5, boxes, scores, (600, 300))
    rows, columns = np.nonzero(found.values < 4)
    assert columns.min() == 8 and columns.max() == 11 and (rows.min(), rows.max()) == (2, 5)
    assert found.worst[0] > 2 / 3 and 1 / 6 < found.worst[1] < 1 / 2


@pytest.mark.parametrize("quarter", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_points_at_a_blurred_quarter(scorer: Scorer, quarter: tuple[int, int]) -> None:
    picture = Image.open(PHOTOS / "coffee.jpg").convert("RGB").resize((480, 400))
    left, top = quarter[1] * 240, quarter[0] * 200
    box = (left, top, left + 240, top + 200)
    picture.paste(picture.crop(box).filter(ImageFilter.GaussianBlur(4)), box)
    found = scorer.explain(picture)
    x, y = found.worst
    assert (int(y > 0.5), int(x > 0.5)) == quarter
    assert found.score == scorer.score(picture)[0]


def test_file_picture_array_and_tensor_give_one_map(scorer: Scorer, tmp_path: Path) -> None:
    picture = Image.open(PHOTOS / "cat.jpg").convert("RGB").resize((300, 240))
    picture.save(tmp_path / "cat.png")
    array = np.array(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 255
    maps = [scorer.explain(image) for image in (tmp_path / "cat.png", picture, array, tensor)]
    for other in maps[1:]:
        assert other.score == maps[0].score and np.array_equal(other.values, maps[0].values)
    grey = tensor.mean(dim=0, keepdim=True)
    assert scorer.explain(grey).values.shape == (CELLS, CELLS)
    shown = maps[0].overlay(picture)
    assert shown.size == (300, 240 + 34) and shown.mode == "RGB"
    assert maps[0].overlay(picture, side=150).size == (260, 120 + 34)


def test_veil_lies_where_the_quality_is_low() -> None:
    grey = Image.new("L", (240, 240), 128)
    values = np.tile(np.linspace(1, 4, CELLS, dtype=np.float32), (CELLS, 1))
    shown = np.array(RegionMap(2.0, values).overlay(grey), np.float64)
    left, right = shown[:240, :10].mean(axis=(0, 1)), shown[:240, 230:240].mean(axis=(0, 1))
    assert left[0] > left[2] + 100 and abs(right - 128).max() < 5
    faint = np.array(RegionMap(2.0, 2 + values / 100).overlay(grey), np.float64)
    assert 1 < abs(faint[:240, :10] - 128).max() < 20
    flat = np.array(RegionMap(2.0, np.full((CELLS, CELLS), 2.0, np.float32)).overlay(grey))
    assert flat.shape == (274, 260, 3) and (flat[:240, :240] == 128).all()


def test_what_cannot_be_explained_says_why(scorer: Scorer, tmp_path: Path) -> None:
    smallest = scorer._images.smallest_side
    with pytest.raises(ImageError, match=f"at least {3 * smallest} pixels"):
        scorer.explain(Image.new("RGB", (3 * smallest - 3, 400)))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.png"):
        scorer.explain(tmp_path / "broken.png")
    with pytest.raises(ImageError):
        scorer.explain(torch.full((3, 300, 300), torch.nan))


def test_command_writes_maps_of_the_worst(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut", "astronaut_blurred", "coffee"):
        Image.open(PHOTOS / f"{name}.jpg").save(folder / f"{name}.jpg")
    Image.new("RGB", (50, 50)).save(folder / "tiny.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    command = ["score", str(folder), "--worst", "2", "--explain", str(tmp_path / "maps"), "--device", "cpu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output  # for the broken one
    (made,) = (tmp_path / "maps").iterdir()
    assert made.name == "001_astronaut_blurred.png" and Image.open(made).size[1] > 100
    assert "no map" in done.output and "tiny.png" in done.output  # the second worst is too small
