"""Synthetic training data: photos distorted, each with an opinion that is calibrated to people.

A rendered set is a folder with `images/` and `labels.csv`. Labels are opinions of the distortions, not of the photos:
every photo is taken to be perfect.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.opinions import read_opinions
from ..errors import OpinionTableError, SyntheticDataError
from ..files import listed, ordered_prefetch, read_json, write_bytes
from ..host.reference_metrics import compare
from ..images.reading import open_image
from .calibration import BEST_OPINION, CALIBRATION_TYPES, REFERENCE_METRICS, Calibration, fit_calibration
from .distortions import KADID_TYPES, Step, apply_chain, codec_versions, kadid_distortion, random_chain
from .kadid_opinions import kadid_opinion, typical_spread
from .recipe import SEEN_SIDE, Recipe, RecipeFile

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
CALIBRATION_FILE = "calibration.json"
COLUMNS = ("file", "mos", "std", "photo", "distortion")
Progress = Callable[[int, int], None]


def find_photos(folders: Sequence[Path]) -> list[Path]:
    """Images of the folders, sorted by name within each.

    Raises:
        SyntheticDataError: a folder is missing or has no image.
    """
    photos = []
    for folder in folders:
        found = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_ENDINGS) if folder.is_dir() else []
        if not found:
            raise SyntheticDataError(f"photos: {folder} is not a folder with images ({', '.join(IMAGE_ENDINGS)})")
        photos += found
    return photos


def render_file(
    file: RecipeFile, progress: Callable[[str], Progress] = lambda name: lambda done, total: None
) -> list[Path]:
    """Render every set of a recipe file, or what is missing of it; chains share one calibration.

    Args:
        progress: called with the name of each set that begins; gives what is told how many of how many are done.

    Returns:
        The tables of the sets, as `render` leaves them.

    Raises:
        SyntheticDataError: as `render`, for any set before the first begins; or training and validation share photos.
    """
    sets = {
        name: (recipe, find_photos([file.photos / path for path in recipe.photos]))
        for name, recipe in file.sets().items()
    }
    trained, validated = (
        {os.path.realpath(photo) for name, (_, photos) in sets.items() if name.startswith(phase) for photo in photos}
        for phase in ("train/", "validation/")
    )
    shared = sorted(trained & validated)
    if shared and not file.allow_overlap:
        raise SyntheticDataError(
            f"{len(shared)} photos are in both training and validation sets, e.g. {shared[0]}: give the sets other "
            "photos, or set allow_overlap: true"
        )
    calibration_file = file.output / CALIBRATION_FILE
    for name, (recipe, photos) in sets.items():
        _recorded(recipe, photos, file.output / name, calibration_file)
    return [
        render(recipe, photos, file.output / name, calibration_file, file.workers, progress(name))
        for name, (recipe, photos) in sets.items()
    ]


def render(
    recipe: Recipe,
    photos: Sequence[Path],
    folder: Path,
    calibration_file: Path | None = None,
    workers: int = 2,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Render a set, or what is missing of it; a finished one is left alone.

    Args:
        photos: undistorted pictures.
        folder: new, or of an earlier rendering of the same recipe.
        calibration_file: where the calibration of chains is kept; fitted on these photos, whichever they are, and
            written if it is not there. Default: in `folder`. Sets that are to be compared share one.
        workers: processes.
        progress: told how many of how many pictures are done.

    Returns:
        `labels.csv`: columns file (relative to it), mos and std (1..5), photo, distortion (JSON). `recipe.json` beside
        it has the recipe, the photos, and the versions of the codecs that it was rendered with.

    Raises:
        SyntheticDataError: `folder` holds another recipe, other photos, or labels of another calibration or of other
            scores of the photos; or these cannot be read.
        ImageError: a photo that cannot be read.
    """
    calibration_file = calibration_file or folder / CALIBRATION_FILE
    table = folder / "labels.csv"
    facts = _recorded(recipe, photos, folder, calibration_file)
    if table.exists():
        return table
    (folder / "images").mkdir(parents=True, exist_ok=True)
    context = get_context("spawn")  # torch and OpenCV hold threads, which a fork would break
    with ProcessPoolExecutor(workers, context, initializer=_one_thread) as pool:
        calibration = None
        if recipe.kind == "chains":
            calibration = _calibration(recipe, photos, calibration_file, pool)
            facts |= _recorded(recipe, photos, folder, calibration_file)
        write_bytes(folder / "recipe.json", json.dumps(facts, indent=1).encode())
        render_one = partial(_render_one, recipe, photos, folder, calibration, facts.get("photo_opinions"))
        rows = []
        for row in ordered_prefetch(render_one, range(recipe.count), pool, 4 * workers):
            rows.append(row)
            progress(len(rows), recipe.count)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(table, text.getvalue().encode())
    return table


def _recorded(recipe: Recipe, photos: Sequence[Path], folder: Path, calibration_file: Path) -> dict[str, Any]:
    """Content of `recipe.json`; refused where the folder has another. Versions are listed, not compared."""
    facts: dict[str, Any] = {
        "recipe": recipe.facts(),
        "photos": [[f"{photo.parent.name}/{photo.name}", photo.stat().st_size] for photo in photos],
    }
    if recipe.kind == "chains" and calibration_file.exists():
        fitted = read_json(calibration_file)
        facts["calibration"] = [*fitted["weights"], fitted["bias"]]
    if recipe.photo_opinions is not None:
        facts["photo_opinions"] = _photo_opinions(recipe.photo_opinions, photos)
    file = folder / "recipe.json"
    before = read_json(file) if file.exists() else {}
    if before and {**before, "versions": None} != {**facts, "versions": None}:
        raise SyntheticDataError(
            f"{folder} holds another recipe, other photos or labels of another calibration; use a new folder, or "
            f"remove this one (and {calibration_file}, for a new calibration)"
        )
    now = {**{name: version(name) for name in ("pyiqa", "pillow", "numpy")}, **codec_versions()}
    versions = before.get("versions", [])
    return {**facts, "versions": versions if now in versions else [*versions, now]}


def _render_one(
    recipe: Recipe,
    photos: Sequence[Path],
    folder: Path,
    calibration: Calibration | None,
    opinions: dict[str, float] | None,
    index: int,
) -> dict[str, Any]:
    """Picture `index` of a set and its row. The row lies beside the picture, so that a resumed run need not redo it."""
    file = f"images/{index:06d}.png"
    note = folder / "images" / f"{index:06d}.json"
    if note.exists():
        return read_json(note)
    rng = np.random.default_rng((recipe.seed, index))
    path = photos[int(rng.integers(len(photos)))]
    photo = _part(np.asarray(open_image(path)), recipe, rng)
    seed = int(rng.integers(2**31))
    if recipe.kind == "kadid":
        shares = np.array([recipe.type_shares.get(kind, 1.0) for kind in KADID_TYPES])
        kind, level = int(rng.choice(list(KADID_TYPES), p=shares / shares.sum())), int(rng.integers(1, 6))
        picture = kadid_distortion(photo, kind, level, seed)
        mos, std = kadid_opinion(kind, level)
        what: Any = {"kadid": [kind, level]}
    elif recipe.kind == "clean":
        picture, mos, std, what = photo, BEST_OPINION, float(typical_spread(BEST_OPINION)), {}
    else:
        assert calibration is not None  # by `render`
        steps = random_chain(seed)
        picture = apply_chain(photo, steps, seed)
        mos = float(calibration.opinion(compare_as_seen(picture, apply_chain(photo, tone_of(steps), seed))))
        std = float(typical_spread(mos))
        what = {"chain": [asdict(step) for step in steps]}
    kept = recipe.severity  # share of the fall below the undistorted photo
    if recipe.region is not None:
        area = float(rng.uniform(*recipe.region))
        picture = np.where(_region(photo.shape[:2], area, rng)[..., None], picture, photo)
        kept *= weight_of_region(area)
        what = {**what, "region": round(area, 4)}
    if opinions is not None or kept != 1:
        undistorted = BEST_OPINION if opinions is None else opinions[path.name]
        mos = undistorted - kept * (undistorted - 1) * max(BEST_OPINION - mos, 0) / (BEST_OPINION - 1)
        std = float(typical_spread(mos))
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "png", compress_level=1)
    write_bytes(folder / file, encoded.getvalue())
    row = {"file": file, "mos": round(mos, 4), "std": round(std, 4), "photo": path.name, "distortion": json.dumps(what)}
    write_bytes(note, json.dumps(row).encode())
    return row


def _photo_opinions(table: Path, photos: Sequence[Path]) -> dict[str, float]:
    """Score of each photo by its file name.

    Raises:
        SyntheticDataError: no such table, a photo that is not in it, or a score outside of 1..5.
    """
    try:
        rows = read_opinions(table, table.parent, file_column="path", mos_column="score")
    except OpinionTableError as error:
        raise SyntheticDataError(
            f"photo_opinions: {table} must be a table with the columns path and score, as `pyiqa-qscorer score -o` "
            f"writes it: {error}"
        ) from error
    found = {Path(row.path).name: row.mos for row in rows}
    if lacking := [photo.name for photo in photos if not 1 <= found.get(photo.name, 0.0) <= 5]:
        raise SyntheticDataError(
            f"photo_opinions: {table} must score every photo from 1 to 5; not so: {listed(lacking)}"
        )
    return found


def tone_of(steps: Sequence[Step]) -> list[Step]:
    """The changes of tone in a chain.

    They are applied to the reference too, so that a label does not blame them: the same tone comes with good photos
    taken at dusk or in fog, and a network cannot tell which it was.
    """
    return [
        step if step.kind == "tone" else Step("tone", {"exposure": step.parameters["exposure"]})
        for step in steps
        if step.kind in ("tone", "low_light")
    ]


def _part(photo: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """A part of a photo with its proportions, resized, mirrored half of the times."""
    share = rng.uniform(recipe.smallest_crop, 1)
    height, width = (round(share * side) for side in photo.shape[:2])
    top, left = (int(rng.integers(full - part + 1)) for full, part in zip(photo.shape, (height, width), strict=False))
    part = photo[top : top + height, left : left + width]
    part = part[:, ::-1] if rng.random() < 0.5 else part
    return _resized(np.ascontiguousarray(part), rng.uniform(*recipe.sides))


def weight_of_region(area: float) -> float:
    """How much of the damage to a whole picture counts where only a share `area` of it has it: .35 to .85 of it.

    The worst part of a picture weighs more than its share of the area. The two numbers are an assumption of ours: no
    opinions of pictures with damage in a known part were at hand to fit them to.
    """
    return 0.35 + 0.5 * area


def _region(size: tuple[int, int], area: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W) bool mask of a share of the area: one side of the picture, left, right, top or bottom, or a rectangle."""
    height, width = size
    mask = np.zeros(size, dtype=bool)
    place = int(rng.integers(5))
    if place < 4:
        share = round(area * (width if place < 2 else height))
        part = slice(0, share) if place % 2 == 0 else slice(-share, None)
        mask[(slice(None), part) if place < 2 else (part, slice(None))] = True
    else:
        rows, columns = (round(side * area**0.5) for side in size)
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        mask[top : top + rows, left : left + columns] = True
    return mask


def at_most_seen_side(photo: np.ndarray) -> np.ndarray:
    """A photo shrunk to KADID-10k's size, if it is larger: its distortions are given in pixels of that size."""
    return _resized(photo, SEEN_SIDE) if max(photo.shape[:2]) > SEEN_SIDE else photo


def _resized(picture: np.ndarray, longer_side: float) -> np.ndarray:
    height, width = picture.shape[:2]
    scale = longer_side / max(height, width)
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    if size == (width, height):
        return picture
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def _calibration(recipe: Recipe, photos: Sequence[Path], file: Path, pool: ProcessPoolExecutor) -> Calibration:
    """The fit to KADID's cells on some of the photos, from `file` if it is there."""
    if file.exists():
        return Calibration(**read_json(file))
    rng = np.random.default_rng((recipe.seed, 2**32))
    chosen = rng.permutation(len(photos))[: recipe.calibration_photos]
    cells = list(product(chosen, CALIBRATION_TYPES, range(1, 6)))
    jobs = ((photos[int(index)], kind, level) for index, kind, level in cells)
    values = list(ordered_prefetch(_compare_cell, jobs, pool, 16))
    calibration = fit_calibration(values, [kadid_opinion(kind, level)[0] for _, kind, level in cells])
    write_bytes(file, json.dumps(asdict(calibration), indent=1).encode())
    return calibration


def _compare_cell(cell: tuple[Path, int, int]) -> dict[str, float]:
    path, kind, level = cell
    photo = at_most_seen_side(np.asarray(open_image(path)))
    return compare_as_seen(kadid_distortion(photo, kind, level, level), photo)


def compare_as_seen(distorted: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The reference metrics of both pictures resized to the size at which KADID-10k's were judged, longer side 512.

    The network sees every picture at one size, too. Compared at their own sizes, pictures that look the same to it
    would have different labels.
    """
    return compare(_resized(distorted, SEEN_SIDE), _resized(reference, SEEN_SIDE), REFERENCE_METRICS)


def _one_thread() -> None:
    """One process per core is faster than threads of each."""
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
