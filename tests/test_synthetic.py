"""Synthetic training data: opinions, calibration, rendering."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from pyiqa_qscorer.cli.app import app
from pyiqa_qscorer.errors import SyntheticDataError, TrainingConfigError
from pyiqa_qscorer.host.reference_metrics import compare
from pyiqa_qscorer.synthetic.calibration import BEST_OPINION, REFERENCE_METRICS, Calibration, fit_calibration
from pyiqa_qscorer.synthetic.distortions import Step, apply_chain
from pyiqa_qscorer.synthetic.kadid_opinions import KADID_OPINIONS, kadid_opinion, typical_spread
from pyiqa_qscorer.synthetic.recipe import RECIPE_FOLDER, PhotoRecipe, Recipe, RecipeFile, read_recipe
from pyiqa_qscorer.synthetic.rendering import (
    CALIBRATION_FILE,
    _compare_cell,
    compare_as_seen,
    find_photos,
    render,
    render_file,
    tone_of,
    weight_of_region,
)
from pyiqa_qscorer.training.dataset import read_dataset
from pyiqa_qscorer.training.dataset_config import FolderDataset

PHOTOS = Path(__file__).with_name("photos")
CALIBRATION = Calibration((1.1, 0.3), -4.0)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("cat", "coffee", "astronaut"):
        Image.open(PHOTOS / f"{name}.jpg").convert("RGB").resize((96, 72)).save(folder / f"{name}.png")
    return find_photos([folder])


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"weights": CALIBRATION.weights, "bias": CALIBRATION.bias, "fit": {}}))
    return file


here = pytest.mark.usefixtures("rendering_here")


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_opinions_are_the_means_of_the_published_labels(shared: Path) -> None:
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row in rows_of(shared / "data/labels/meta_info_KADID10kDataset.csv"):
        _, kind, level = row["dist_name"].removesuffix(".png").split("_")
        found.setdefault((int(kind), int(level)), []).append((float(row["dmos"]), float(row["std"])))
    assert len(found) == 125
    for (kind, level), opinions in found.items():
        np.testing.assert_allclose(np.mean(opinions, axis=0), kadid_opinion(kind, level), atol=5.1e-4)


def test_opinions_spread_in_the_middle_and_fall_with_every_distance() -> None:
    ends, middle = typical_spread(np.array([1.3, 4.6])), typical_spread(3.0)
    assert (ends < middle).all() and ends.min() > 0.4 and middle < 1.1
    assert len(KADID_OPINIONS) == 25 and all(len(levels) == 5 for levels in KADID_OPINIONS.values())
    calibration, equal = Calibration((0.5, 0.5), -4.0), {"gmsd": 0.0, "psnry": 80.0}
    assert 4 < calibration.opinion(equal) <= BEST_OPINION
    worse = {"gmsd": 0.1, "psnry": 25.0}
    for name, value in worse.items():
        assert calibration.opinion({**equal, name: value}) < calibration.opinion(equal)
    assert 1 <= CALIBRATION.opinion({"gmsd": 0.4, "psnry": 8.0}) < 1.3


def test_calibrations_are_fitted_and_tone_is_not_blamed() -> None:
    random = np.random.default_rng(0)
    values = [
        {"gmsd": gmsd, "psnry": psnr}
        for gmsd, psnr in zip(random.uniform(0.005, 0.3, 200), random.uniform(15, 45, 200), strict=True)
    ]
    true = Calibration((0.8, 0.4), -2.0)
    opinions = [float(true.opinion(value)) for value in values]
    found = fit_calibration(values, opinions)
    np.testing.assert_allclose(found.weights, true.weights, atol=1e-3)
    assert found.bias == pytest.approx(true.bias, abs=1e-2) and found.fit["srcc over pictures"] > 0.999
    with pytest.raises(ValueError, match="20 pictures"):
        fit_calibration(values[:1], [3.0])
    # The reference of a chain gets its changes of tone, so a toned but otherwise perfect picture is perfect.
    photo = np.asarray(Image.open(PHOTOS / "coffee.jpg").convert("RGB").resize((128, 96)))
    tone = Step("tone", {"exposure": -0.7, "contrast": 1.2, "gamma": 1.0, "saturation": 0.8})
    toned, untouched = apply_chain(photo, [tone], 0), apply_chain(photo, tone_of([tone]), 0)
    assert not np.array_equal(toned, photo)
    assert float(CALIBRATION.opinion(compare(toned, untouched, REFERENCE_METRICS))) == pytest.approx(
        float(CALIBRATION.opinion(compare(photo, photo, REFERENCE_METRICS)))
    )


@here
@pytest.mark.parametrize("kind", ["kadid", "chains"])
def test_rendering_is_a_function_of_the_recipe(
    photos: list[Path], calibration: Path, tmp_path: Path, kind: str
) -> None:
    """Whatever the number of processes: see `test_killed_rendering_goes_on`."""
    settings: dict[str, Any] = {"kind": kind, "longer_sides": (96, 97)}
    recipe = Recipe(**settings, count=6, seed=3)
    tables = [render(recipe, photos, tmp_path / name, calibration) for name in ("one", "again")]
    first, second = (rows_of(table) for table in tables)
    assert first == second and len(first) == 6
    for row in first:
        images = [(table.parent / row["file"]).read_bytes() for table in tables]
        assert images[0] == images[1] and 1 <= float(row["mos"]) <= 5 and 0.4 < float(row["std"]) < 1.2
    other = rows_of(render(Recipe(**settings, count=6, seed=4), photos, tmp_path / "other", calibration))
    assert [row["distortion"] for row in other] != [row["distortion"] for row in first]
    with pytest.raises(SyntheticDataError, match="another recipe"):
        render(Recipe(**settings, count=3), photos, tables[0].parent, calibration)
    if kind == "chains":
        calibration.write_text(json.dumps({"weights": [2.0, 0.3], "bias": -4.0, "fit": {}}))
        with pytest.raises(SyntheticDataError, match="another calibration"):
            render(recipe, photos, tables[0].parent, calibration)


@here
def test_a_region_is_damaged_and_blamed_in_part(photos: list[Path], tmp_path: Path) -> None:
    shares = {kind: float(kind == 1) for kind in range(1, 26)}  # blur, which changes nearly every pixel of a photo
    settings: dict[str, Any] = {"kind": "kadid", "count": 12, "type_shares": shares, "longer_sides": (96, 97)}
    rows = rows_of(render(Recipe(**settings, region=(0.3, 0.6)), photos, tmp_path / "part"))
    whole = rows_of(render(Recipe(**settings), photos, tmp_path / "whole"))
    for row, other in zip(rows, whole, strict=True):  # the same photo, type, level and noise
        area = json.loads(row["distortion"])["region"]
        assert 0.3 <= area <= 0.6 and json.loads(row["distortion"])["kadid"] == json.loads(other["distortion"])["kadid"]
        of_whole = min(float(other["mos"]), BEST_OPINION)
        expected = BEST_OPINION - (BEST_OPINION - of_whole) * weight_of_region(area)
        assert float(row["mos"]) == pytest.approx(expected, abs=1e-3) and expected >= of_whole
        part, all_of_it = (np.asarray(Image.open(tmp_path / folder / row["file"])) for folder in ("part", "whole"))
        blurred = (part == all_of_it).all(axis=2).mean()
        assert area - 0.05 <= blurred, "the damaged part is that of the damaged picture"
    assert 0 < weight_of_region(0.01) < weight_of_region(0.99) < 1
    with pytest.raises(ValueError, match="region must be"):
        Recipe(**settings, region=(0.5, 1.0))


@here
def test_labels_can_be_what_damage_leaves_of_a_photos_own_score(photos: list[Path], tmp_path: Path) -> None:
    own = dict(zip((photo.name for photo in photos), (2.5, 3.5, BEST_OPINION), strict=True))
    table = tmp_path / "scores.csv"
    table.write_text("path,score\n" + "".join(f"elsewhere/{name},{score}\n" for name, score in own.items()))
    settings: dict[str, Any] = {"kind": "kadid", "count": 10, "longer_sides": (64, 65), "seed": 2}
    plain = rows_of(render(Recipe(**settings), photos, tmp_path / "plain"))
    recipe = Recipe(**settings, photo_opinions=table, severity=0.5)
    for row, other in zip(rows_of(render(recipe, photos, tmp_path / "own")), plain, strict=True):
        assert row["photo"] == other["photo"] and row["distortion"] == other["distortion"]
        kept = (min(float(other["mos"]), BEST_OPINION) - 1) / (BEST_OPINION - 1)
        expected = 1 + (own[row["photo"]] - 1) * (1 - 0.5 * (1 - kept))
        assert float(row["mos"]) == pytest.approx(expected, abs=1e-3)
    clean = Recipe(kind="clean", count=4, photo_opinions=table)
    for row in rows_of(render(clean, photos, tmp_path / "clean")):
        assert float(row["mos"]) == own[row["photo"]]
    table.write_text(table.read_text().replace("2.5", "2.6"))
    with pytest.raises(SyntheticDataError, match="holds another recipe"):
        render(recipe, photos, tmp_path / "own")  # labelled by the scores before
    table.write_text("path,score\ncat.png,2\n")
    with pytest.raises(SyntheticDataError, match=r"every photo from 1 to 5; not so: \w+\.png, \w+\.png"):
        render(recipe, photos, tmp_path / "lacking")
    with pytest.raises(SyntheticDataError, match="columns path and score"):
        lacking = recipe.model_copy(update={"photo_opinions": tmp_path / "none.csv"})
        render(lacking, photos, tmp_path / "none")


@here
def test_opinions_of_clean_photos_and_of_cells_of_kadid(photos: list[Path], tmp_path: Path) -> None:
    table = render(Recipe(kind="clean", count=3, longer_sides=(96, 97)), photos, tmp_path / "set")
    assert [(row["mos"], row["distortion"]) for row in rows_of(table)] == [(str(BEST_OPINION), "{}")] * 3
    shares = {kind: 0.0 for kind in range(1, 25)}
    table = render(Recipe(kind="kadid", count=5, type_shares=shares), photos, tmp_path / "kadid")
    for row in rows_of(table):
        kind, level = json.loads(row["distortion"])["kadid"]
        assert kind == 25 and (float(row["mos"]), float(row["std"])) == kadid_opinion(kind, level)
        assert max(Image.open(table.parent / row["file"]).size) == 512  # longer sides follow the kind
    assert Recipe(kind="chains", count=3).sides == (448, 768)
    assert Recipe(kind="chains", count=3, longer_sides=(100, 120)).sides == (100, 120)


@here
def test_calibration_is_fitted_once_on_the_photos(photos: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "fitted.json"
    recipe = Recipe(kind="chains", count=2, calibration_photos=1, longer_sides=(96, 97))
    render(recipe, photos, tmp_path / "set", file)
    fitted = json.loads(file.read_text())
    assert fitted["fit"]["srcc over cells"] > 0.5 and min(fitted["weights"]) >= 0
    changed = file.stat().st_mtime_ns
    render(recipe, photos, tmp_path / "again", file)
    assert file.stat().st_mtime_ns == changed


@pytest.mark.slow
def test_killed_rendering_goes_on(
    photos: list[Path], calibration: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe = Recipe(kind="kadid", count=400, seed=1, longer_sides=(128, 129))
    program = """
import sys
from pathlib import Path
from pyiqa_qscorer.synthetic.recipe import Recipe
from pyiqa_qscorer.synthetic.rendering import find_photos, render
if __name__ == "__main__":
    recipe = Recipe(kind="kadid", count=400, seed=1, longer_sides=(128, 129))
    render(recipe, find_photos([Path(sys.argv[1])]), Path(sys.argv[2]), workers=1)
"""
    script = tmp_path / "program.py"
    script.write_text(program)
    folder = tmp_path / "set"
    process = subprocess.Popen(
        [sys.executable, str(script), str(photos[0].parent), str(folder)], start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list(folder.glob("images/*.json"))) < 20:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "labels.csv").exists()
    kept = {note: note.stat().st_mtime_ns for note in folder.glob("images/*.json")}
    table = render(recipe, photos, folder, workers=2)
    assert len(rows_of(table)) == 400 and {note: note.stat().st_mtime_ns for note in kept} == kept
    chains = Recipe(kind="chains", count=6, seed=3, longer_sides=(96, 97))
    compared = render(chains, photos, tmp_path / "two", calibration, workers=2)
    request.getfixturevalue("rendering_here")  # as many processes as there are
    assert rows_of(table) == rows_of(render(recipe, photos, tmp_path / "whole"))
    assert rows_of(compared) == rows_of(render(chains, photos, tmp_path / "one", calibration))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.a.kind": "tid"}, r"train\.a\.kind: .*'kadid', 'chains' or 'clean'"),
        ({"train.a.type_shares": {26: 1.0}}, r"types 1\.\.25, got \[26\]"),
        ({"train.a.type_shares": {1: -1.0}}, "must be >= 0"),
        ({"train.a.kind": "chains", "train.a.type_shares": {1: 1.0}}, "type_shares goes with kind: kadid"),
        ({"train.a.cuont": 3}, r"train\.a\.cuont: unknown key; did you mean 'count'"),
        ({"train": {}}, "at least one set"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("{output: out, train: {a: {kind: kadid, count: 2, photos: [x]}}}")
    assert read_recipe(file).train["a"].count == 2
    with pytest.raises(TrainingConfigError, match=words):
        read_recipe(file, changes)


@pytest.mark.parametrize("path", sorted(RECIPE_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_package_are_valid_and_found_by_name(path: Path) -> None:
    assert read_recipe(Path(path.name)) == read_recipe(path)


def test_photos_must_be_there_and_differ_between_training_and_validation(photos: list[Path], tmp_path: Path) -> None:
    part = PhotoRecipe(kind="kadid", count=2, photos=[photos[0].parent])
    with pytest.raises(SyntheticDataError, match=r"3 photos are in both .*other photos"):
        render_file(RecipeFile(output=tmp_path / "out", train={"a": part}, validation={"a": part}))
    with pytest.raises(SyntheticDataError, match="nowhere is not a folder with images"):
        train = {"a": part.model_copy(update={"photos": [Path()]})}
        render_file(RecipeFile(output=tmp_path / "out", photos=tmp_path / "nowhere", train=train))
    assert not (tmp_path / "out").exists()


@here
def test_command_renders_every_set_and_records_recipe_and_codecs(photos, calibration, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CALIBRATION_FILE).write_text(calibration.read_text())
    file = tmp_path / "recipe.yaml"
    file.write_text("""
train: {some: {kind: chains, count: 2, photos: [photos]}}
validation: {some: {kind: kadid, count: 2, photos: [photos]}}
allow_overlap: true
output: elsewhere
""")
    command = ["render", str(file), "--photos", str(tmp_path), "-o", str(tmp_path / "out"), "--workers", "2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    tables = [Path(line) for line in done.stdout.splitlines()]
    assert tables == [tmp_path / "out" / part / "some/labels.csv" for part in ("train", "validation")]
    config = FolderDataset(csv=tables[0], std_column="std", mos_range=(1, 5))
    assert len(read_dataset(config, "train", needs_std=True).images) == 2
    facts = json.loads((tables[0].parent / "recipe.json").read_text())
    assert facts["recipe"]["count"] == 2 and len(facts["photos"]) == 3
    assert {"libavif", "av", "opencv", "pillow"} <= facts["versions"][0].keys()
    refused = CliRunner().invoke(app, [*command, "--set", "validation.some.seed=9"])
    assert refused.exit_code == 2 and "another recipe" in " ".join(refused.output.split())


def test_size_of_a_picture_is_not_blamed(tmp_path: Path) -> None:
    """Enlarged damage of an enlarged photo is judged like the damage of the photo."""
    photo = Image.open(PHOTOS / "coffee.jpg").convert("RGB").resize((512, 384), Image.Resampling.LANCZOS)
    blurred = photo.filter(ImageFilter.GaussianBlur(2))
    larger = [np.asarray(p.resize((1024, 768), Image.Resampling.LANCZOS)) for p in (blurred, photo)]
    same = CALIBRATION.opinion(compare_as_seen(np.asarray(blurred), np.asarray(photo)))
    assert float(CALIBRATION.opinion(compare_as_seen(*larger))) == pytest.approx(float(same), abs=0.05)
    assert abs(float(CALIBRATION.opinion(compare(*larger, REFERENCE_METRICS))) - same) > 0.05
    # Its distortions are given in pixels: on a larger photo they would be weaker than their opinions say.
    photo = Image.open(PHOTOS / "coffee.jpg").convert("RGB").resize((512, 384), Image.Resampling.LANCZOS)
    photo.save(tmp_path / "small.png")
    photo.resize((1536, 1152), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    small, large = (_compare_cell((tmp_path / f"{name}.png", 1, 4)) for name in ("small", "large"))
    for name in REFERENCE_METRICS:
        assert large[name] == pytest.approx(small[name], rel=0.1)
