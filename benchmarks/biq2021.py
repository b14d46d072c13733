"""Tables of BIQ2021 to train on and to measure with: near-duplicates grouped, validation disjoint from training.

    python benchmarks/biq2021.py BIQ2021 OUTPUT

BIQ2021 (Ahmed, Asif, "BIQ2021: a large-scale blind image quality assessment database", Journal of Electronic Imaging
31(5), 2022) is a folder with `Images/` and two tables of MOS on 0..1; its authors publish it on GitHub. Albums hold
the same scene many times, and its official split puts some of these on both sides. Photos whose 24 x 24 gray thumbnails
correlate above 0.93 count as near-duplicates, chains of them as one group, and a group stays together: a tenth of
the groups of the training table, chosen by a hash of a group's first file name, is the validation part.

OUTPUT gets `train.csv` and `validation.csv` (disjoint groups of the official training table) and `test.csv` (the
official test table), each with columns file, mos as published (0..1, higher is better), subset, group and, in test.csv,
has_twin (a near-duplicate in the official training table); `train/`, `validation/` and `test/`, links to their photos;
and `photo_opinions.csv`, the training photos' MOS on 1..5 as a recipe of `pyiqa-qscorer render` reads them.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

TABLES = {"train": "Train (Images and MOS).csv", "test": "Test (Images and MOS).csv"}
THUMBNAIL = 24  # pixels
NEAR = 0.93  # correlation of two thumbnails
VALIDATION_SHARE = 10  # one group in so many


@dataclass(frozen=True)
class Photos:
    """All photos of both tables, in their order; arrays of one entry per photo.

    Attributes:
        names: files below `Images`.
        mos: 0..1.
        is_test: in the official test table.
        subset: `ss01`, `ss02` or `ss03`.
        group: number of the group of near-duplicates.
        has_twin: a near-duplicate lies in the official training table (itself not counted).
    """

    names: np.ndarray
    mos: np.ndarray
    is_test: np.ndarray
    subset: np.ndarray
    group: np.ndarray
    has_twin: np.ndarray

    @property
    def is_validation(self) -> np.ndarray:
        """Of the official training table, in a group that the rule holds out."""
        first: dict[int, str] = {}
        for name, group in zip(self.names, self.group, strict=True):
            first[group] = min(first.get(group, name), name)
        held_out = {group for group, name in first.items() if _number(f"0 {name}") % VALIDATION_SHARE == 0}
        return ~self.is_test & np.isin(self.group, sorted(held_out))

    @property
    def is_training(self) -> np.ndarray:
        return ~self.is_test & ~self.is_validation


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def thumbnail(file: Path) -> np.ndarray:
    """(THUMBNAIL^2,) float32 gray values, mean 0, norm 1, so that a dot product of two is their correlation."""
    with Image.open(file) as photo:
        photo.draft("L", (64, 64))  # a JPEG is decoded at an eighth of its size
        gray = np.asarray(photo.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32).ravel()
    gray = gray - gray.mean()
    return gray / max(float(np.linalg.norm(gray)), 1e-6)


def near_pairs(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (i, j) of all pairs above `NEAR`, each in both orders and each photo with itself."""
    found = []
    for start in range(0, len(thumbnails), 1000):
        rows, columns = np.nonzero(thumbnails[start : start + 1000] @ thumbnails.T > NEAR)
        found.append((rows + start, columns))
    rows, columns = (np.concatenate(side) for side in zip(*found, strict=True))
    return rows, columns


def read_photos(folder: Path) -> Photos:
    """The photos of both tables, grouped.

    Raises:
        FileNotFoundError: a table, or a photo that a table names, is not there.
    """
    there = {path.name.lower(): path.name for path in (folder / "Images").iterdir()}  # one file ends in .JPG
    names, mos, is_test = [], [], []
    for split, table in TABLES.items():
        with (folder / table).open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                if row["Image Name"].lower() not in there:
                    raise FileNotFoundError(f"{folder / 'Images' / row['Image Name']}, which {table} names")
                names.append(there[row["Image Name"].lower()])
                mos.append(float(row["MOS"]))
                is_test.append(split == "test")
    with ThreadPoolExecutor() as pool:
        thumbnails = np.stack(list(pool.map(thumbnail, [folder / "Images" / name for name in names])))
    rows, columns = near_pairs(thumbnails)
    size = (len(names), len(names))
    _, group = connected_components(coo_matrix((np.ones(len(rows)), (rows, columns)), size), directed=False)
    tested = np.array(is_test)
    has_twin = np.zeros(len(names), dtype=bool)
    has_twin[rows[~tested[columns] & (rows != columns)]] = True
    subset = np.array([name[:4].lower() for name in names])
    return Photos(np.array(names), np.array(mos), tested, subset, group, has_twin)


def write_table(file: Path, photos: Photos, chosen: np.ndarray) -> None:
    """Rows of the chosen photos."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["file", "mos", "subset", "group", "has_twin"])
        for index in np.nonzero(chosen)[0]:
            values = (photos.names[index], photos.mos[index], photos.subset[index], photos.group[index])
            writer.writerow([*values, int(photos.has_twin[index])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("biq2021", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    photos = read_photos(arguments.biq2021)
    for name, chosen in (
        ("train", photos.is_training),
        ("validation", photos.is_validation),
        ("test", photos.is_test),
    ):
        links = arguments.output / name
        links.mkdir(parents=True, exist_ok=True)
        for file in photos.names[chosen]:
            if not (links / file).exists():
                (links / file).symlink_to((arguments.biq2021 / "Images" / file).resolve())
        write_table(arguments.output / f"{name}.csv", photos, chosen)
        counts = {part: int((chosen & (photos.subset == part)).sum()) for part in sorted(set(photos.subset))}
        print(
            f"{name}: {chosen.sum()} photos {counts}, {(chosen & photos.has_twin).sum()} of them with a near-duplicate"
        )
    with (arguments.output / "photo_opinions.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["path", "score"])
        for index in np.nonzero(photos.is_training)[0]:
            writer.writerow([photos.names[index], round(1 + 4 * photos.mos[index], 4)])


if __name__ == "__main__":
    main()
