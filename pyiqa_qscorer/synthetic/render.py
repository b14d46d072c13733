"""Synthetic training data: photos distorted, each with an opinion that is calibrated to people.

A rendered set is a folder with `images/` and `labels.csv`. Labels are opinions of the distortions, not of the photos:
every photo is taken to be perfect.
"""

from __future__ import annotations

import csv
import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import SyntheticDataError
from ..files import write_bytes
from ..images.reading import open_image
from .calibration import CALIBRATION_TYPES, Calibration, fit_calibration
from .distortions import KADID_TYPES, Step, apply_chain, kadid_distortion, random_chain
from .kadid_opinions import kadid_opinion, typical_spread

CompareToReference = Callable[[np.ndarray, np.ndarray], dict[str, float]]
"""(distorted, reference) uint8 (H, W, 3) -> value of each of `calibration.REFERENCE_METRICS`."""

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
CALIBRATION_FILE = "calibration.json"
SEEN_SIDE = 512  # longer side of KADID-10k's pictures
COLUMNS = ("file", "mos", "std", "photo", "distortion")


@dataclass(frozen=True)
class Recipe:
    """What a synthetic set consists of; the same recipe and photos give the same pictures and labels.

    Attributes:
        kind: `kadid`: the 25 types x 5 levels of KADID-10k, labelled with the human mean and spread of the cell;
            `chains`: realistic chains, labelled by calibrated full-reference metrics.
        count: pictures.
        type_shares: how often a KADID type is drawn against the others, by type; 1 where not named.
        smallest_crop: side of the part of a photo that is distorted, as a share of the photo's, drawn from here to 1.
        longer_sides: pixels that the longer side of that part is resized to before it is distorted, drawn between the
            two; None: 512, as in KADID-10k, for `kadid`, and 448 to 768 for `chains`.
        calibration_photos: photos that the calibration of chains is fitted on.
        seed: of everything random.
    """

    kind: str
    count: int
    type_shares: Mapping[int, float]
    smallest_crop: float = 0.8
    longer_sides: tuple[int, int] | None = None
    calibration_photos: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("kadid", "chains"):
            raise ValueError(f"kind must be 'kadid' or 'chains', got {self.kind!r}")
        if unknown := set(self.type_shares) - set(KADID_TYPES):
            raise ValueError(f"type_shares must name KADID types 1..25, got {sorted(unknown)}")

    def digest(self) -> dict[str, Any]:
        """As JSON keeps it."""
        shares = {str(kind): share for kind, share in self.type_shares.items()}
        return {**asdict(self), "type_shares": shares, "longer_sides": list(self.sides)}

    @property
    def sides(self) -> tuple[int, int]:
        """`longer_sides` with its default."""
        return self.longer_sides or ((SEEN_SIDE, SEEN_SIDE) if self.kind == "kadid" else (448, 768))


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


def render(
    recipe: Recipe,
    photos: Sequence[Path],
    folder: Path,
    compare: CompareToReference | None = None,
    calibration_file: Path | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Render a set, or what is missing of it; a finished one is left alone.

    Args:
        photos: undistorted pictures.
        folder: new, or of an earlier rendering of the same recipe.
        compare: the full-reference metrics; needed for chains.
        calibration_file: where the calibration of chains is kept; fitted on these photos, whichever they are, and
            written if it is not there. Default: in `folder`. Sets that are to be compared share one.
        workers: processes.
        progress: told how many of how many pictures are done.

    Returns:
        `labels.csv`: columns file (below `images/`), mos and std (1..5), photo, distortion (JSON).

    Raises:
        SyntheticDataError: `folder` holds another recipe, other photos, or labels of another calibration.
        ValueError: chains without `compare`.
        ImageError: a photo that cannot be read.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    calibration_file = calibration_file or folder / CALIBRATION_FILE
    recipe_file, table = folder / "recipe.json", folder / "labels.csv"
    facts: dict[str, Any] = {
        "recipe": recipe.digest(),
        "photos": [[f"{photo.parent.name}/{photo.name}", photo.stat().st_size] for photo in photos],
    }
    if table.exists():
        _check_facts(facts, recipe_file, calibration_file, recipe)
        return table
    if recipe.kind == "chains" and compare is None:
        raise ValueError("compare must be given for kind 'chains': its labels come from full-reference metrics")
    context = get_context("spawn")  # torch and OpenCV hold threads, which a fork would break
    with ProcessPoolExecutor(workers, context, initializer=_one_thread) as pool:
        calibration = None
        if recipe.kind == "chains":
            assert compare is not None
            calibration = _calibration(recipe, photos, calibration_file, compare, pool)
        facts = _check_facts(facts, recipe_file, calibration_file, recipe)
        write_bytes(recipe_file, json.dumps(facts, indent=1).encode())
        jobs = ((recipe, index, photos, folder, compare, calibration) for index in range(recipe.count))
        rows = []
        for row in _in_order(pool, _render_one, jobs, 4 * workers):
            rows.append(row)
            progress(len(rows), recipe.count)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(table, text.getvalue().encode())
    return table


def _check_facts(facts: dict[str, Any], file: Path, calibration_file: Path, recipe: Recipe) -> dict[str, Any]:
    """The facts with the calibration that labels come from; refused where `file` has others."""
    if recipe.kind == "chains" and calibration_file.exists():
        fitted = json.loads(calibration_file.read_text())
        facts = {**facts, "calibration": [*fitted["weights"], fitted["bias"]]}
    if file.exists() and json.loads(file.read_text()) != facts:
        raise SyntheticDataError(
            f"{file.parent} holds another recipe, other photos or labels of another calibration; use a new folder, or "
            f"remove this one (and {calibration_file}, for a new calibration)"
        )
    return facts


def _render_one(
    recipe: Recipe,
    index: int,
    photos: Sequence[Path],
    folder: Path,
    compare: CompareToReference | None,
    calibration: Calibration | None,
) -> dict[str, Any]:
    """Picture `index` of a set and its row. The row lies beside the picture, so that a resumed run need not redo it."""
    file = f"{index:06d}.png"
    note = folder / "images" / f"{index:06d}.json"
    if note.exists():
        return json.loads(note.read_text())
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
    else:
        assert compare is not None and calibration is not None  # by `render`
        steps = random_chain(seed)
        picture = apply_chain(photo, steps, seed)
        mos = float(calibration.opinion(compare_as_seen(compare, picture, apply_chain(photo, tone_of(steps), seed))))
        std = float(typical_spread(mos))
        what = {"chain": [asdict(step) for step in steps]}
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "png", compress_level=1)
    write_bytes(folder / "images" / file, encoded.getvalue())
    row = {
        "file": file,
        "mos": round(mos, 4),
        "std": round(std, 4),
        "photo": path.name,
        "distortion": json.dumps(what),
    }
    write_bytes(note, json.dumps(row).encode())
    return row


def tone_of(steps: Sequence[Step]) -> list[Step]:
    """The changes of tone in a chain: exposure, contrast, gamma, saturation.

    They are applied to the reference too, so that a label does not blame them: the same tone comes with good photos
    taken at dusk or in fog, and a network cannot tell which it was.
    """
    toned = []
    for step in steps:
        if step.kind == "tone":
            toned.append(step)
        elif step.kind == "low_light":
            neutral = {"contrast": 1.0, "gamma": 1.0, "saturation": 1.0}
            toned.append(Step("tone", {"exposure": step.parameters["exposure"], **neutral}))
    return toned


def _part(photo: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """A part of a photo with its proportions, resized, mirrored half of the times."""
    share = rng.uniform(recipe.smallest_crop, 1)
    height, width = (round(share * side) for side in photo.shape[:2])
    top, left = (int(rng.integers(full - part + 1)) for full, part in zip(photo.shape, (height, width), strict=False))
    part = photo[top : top + height, left : left + width]
    part = part[:, ::-1] if rng.random() < 0.5 else part
    return _resized(np.ascontiguousarray(part), rng.uniform(*recipe.sides))


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


def _calibration(
    recipe: Recipe, photos: Sequence[Path], file: Path, compare: CompareToReference, pool: ProcessPoolExecutor
) -> Calibration:
    """The fit to KADID's cells on some of the photos, from `file` if it is there."""
    if file.exists():
        return Calibration(**json.loads(file.read_text()))
    rng = np.random.default_rng((recipe.seed, 2**32))
    chosen = rng.permutation(len(photos))[: recipe.calibration_photos]
    cells = list(product(chosen, CALIBRATION_TYPES, range(1, 6)))
    jobs = ((photos[int(index)], kind, level, compare) for index, kind, level in cells)
    values = list(_in_order(pool, _compare_cell, jobs, 16))
    calibration = fit_calibration(values, [kadid_opinion(kind, level)[0] for _, kind, level in cells])
    write_bytes(file, json.dumps(asdict(calibration), indent=1).encode())
    return calibration


def _compare_cell(path: Path, kind: int, level: int, compare: CompareToReference) -> dict[str, float]:
    photo = at_most_seen_side(np.asarray(open_image(path)))
    return compare_as_seen(compare, kadid_distortion(photo, kind, level, level), photo)


def compare_as_seen(compare: CompareToReference, distorted: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The metrics of both pictures resized to the size at which KADID-10k's were judged, longer side 512.

    The network sees every picture at one size, too. Compared at their own sizes, pictures that look the same to it
    would have different labels.
    """
    return compare(*(_resized(picture, SEEN_SIDE) for picture in (distorted, reference)))


def _in_order(
    pool: ProcessPoolExecutor, work: Callable[..., Any], jobs: Iterator[tuple[Any, ...]], ahead: int
) -> Iterator[Any]:
    """Results in the order of the jobs, `ahead` of them under way at a time."""
    pending: deque[Future[Any]] = deque()
    for job in jobs:
        pending.append(pool.submit(work, *job))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _one_thread() -> None:
    """One process per core is faster than threads of each."""
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
