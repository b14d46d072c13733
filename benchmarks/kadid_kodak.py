"""Pristine photos distorted as in KADID-10k, as a folder with a CSV file that `pyiqa-qscorer benchmark` reads.

    python benchmarks/kadid_kodak.py PHOTOS meta_info_KADID10kDataset.csv OUTPUT
    pyiqa-qscorer benchmark -m qscorer-mini piqe ssim vif -d kodak=OUTPUT/opinions.csv

The MOS of an image is the mean of what people said of that distortion and level over the 81 photos of KADID-10k: an
opinion of the distortion, not of the picture. `std` is the spread of those 81 numbers.
"""

from __future__ import annotations

import csv
import os
import statistics
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.progress import track

from pyiqa_qscorer.image_files import open_image
from pyiqa_qscorer.score_files import find_images
from pyiqa_qscorer.training.distortions import KADID_TYPES, kadid_distortion

LEVELS = range(1, 6)


def opinions(table: Path) -> dict[tuple[int, int], tuple[float, float]]:
    """(type, level) -> mean and spread of the opinions, 1 (worst) .. 5 (best)."""
    found: dict[tuple[int, int], list[float]] = {}
    with table.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            _, kind, level = Path(row["dist_name"]).stem.split("_")
            found.setdefault((int(kind), int(level)), []).append(float(row["dmos"]))
    return {cell: (statistics.fmean(values), statistics.stdev(values)) for cell, values in found.items()}


def write_png(path: Path, picture: np.ndarray) -> None:
    temporary = path.with_suffix(".unfinished")
    Image.fromarray(picture).save(temporary, "PNG")
    os.replace(temporary, path)


def main(
    photos: Annotated[Path, typer.Argument(help="folder of pristine photos")],
    labels: Annotated[Path, typer.Argument(help="meta_info_KADID10kDataset.csv")],
    output: Annotated[Path, typer.Argument(help="folder to write; files that are there are kept")],
    count: Annotated[int | None, typer.Option("--photos", help="only the first N photos", min=1)] = None,
    types: Annotated[list[int] | None, typer.Option("--type", help="only this type, 1 to 25; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="of what is random in a distortion")] = 0,
) -> None:
    """Write every photo with every type and level, its pristine original, and opinions.csv."""
    cells = opinions(labels)
    kinds = sorted(types or KADID_TYPES)
    for kind in kinds:
        if kind not in KADID_TYPES:
            raise typer.BadParameter(f"--type must be one of 1 to {len(KADID_TYPES)}, got {kind}")
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in track(find_images([photos]).paths[:count], description="Distorting"):
        reference = f"{Path(path).stem}.png"
        pristine = np.asarray(open_image(path))
        if not (output / reference).exists():
            write_png(output / reference, pristine)
        for kind in kinds:
            for level in LEVELS:
                name = f"{Path(path).stem}_{kind:02}_{level:02}.png"
                if not (output / name).exists():
                    own_seed = seed + zlib.crc32(reference.encode())  # other noise in every photo
                    write_png(output / name, kadid_distortion(pristine, kind, level, own_seed))
                mean, spread = cells[kind, level]
                rows.append([name, f"{mean:.4f}", f"{spread:.4f}", reference])
    temporary = output / "opinions.unfinished"
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "mos", "std", "reference"], *rows])
    os.replace(temporary, output / "opinions.csv")
    print(f"{len(rows)} images and {output / 'opinions.csv'}")


if __name__ == "__main__":
    typer.run(main)
