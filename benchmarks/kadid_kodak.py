"""Pristine photos distorted as in KADID-10k, as a folder with a CSV file that `pyiqa-qscorer benchmark` reads.

    python benchmarks/kadid_kodak.py PHOTOS OUTPUT
    pyiqa-qscorer benchmark -m qscorer-mini piqe ssim vif -d kodak=OUTPUT/opinions.csv

Larger photos are shrunk to longer side 512 first: KADID-10k's distortions are given in pixels of that size. The MOS of
an image is the mean of what people said of that distortion and level over the 81 photos of KADID-10k: an opinion of the
distortion, not of the picture. `std` is the mean spread of the raters.
"""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.progress import track

from pyiqa_qscorer.files import write_bytes, write_text
from pyiqa_qscorer.images.reading import open_image
from pyiqa_qscorer.synthetic.distortions import KADID_TYPES, kadid_distortion
from pyiqa_qscorer.synthetic.kadid_opinions import kadid_opinion
from pyiqa_qscorer.synthetic.rendering import at_most_seen_side, find_photos

LEVELS = range(1, 6)


@dataclass(frozen=True)
class DistortedPhoto:
    """A written picture, its pristine original beside it, and what was done to it."""

    file: Path
    reference: Path
    kind: int
    level: int


def distort(
    photos: Sequence[Path], output: Path, kinds: Sequence[int] = tuple(KADID_TYPES), seed: int = 0
) -> list[DistortedPhoto]:
    """Write every photo, and it with every type and level, as PNG; files that are there are kept."""
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for path in track(photos, description="Distorting"):
        reference = output / f"{path.stem}.png"
        pristine = at_most_seen_side(np.asarray(open_image(path)))
        if not reference.exists():
            write_png(reference, pristine)
        own_seed = seed + zlib.crc32(reference.name.encode())  # other noise in every photo
        for kind in kinds:
            for level in LEVELS:
                picture = DistortedPhoto(output / f"{path.stem}_{kind:02}_{level:02}.png", reference, kind, level)
                if not picture.file.exists():
                    write_png(picture.file, kadid_distortion(pristine, kind, level, own_seed))
                written.append(picture)
    return written


def write_png(path: Path, picture: np.ndarray) -> None:
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "PNG", compress_level=1)
    write_bytes(path, encoded.getvalue())


def main(
    photos: Annotated[Path, typer.Argument(help="folder of pristine photos")],
    output: Annotated[Path, typer.Argument(help="folder to write; files that are there are kept")],
    count: Annotated[int | None, typer.Option("--photos", help="only the first N photos", min=1)] = None,
    types: Annotated[list[int] | None, typer.Option("--type", help="only this type, 1 to 25; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="of what is random in a distortion")] = 0,
) -> None:
    """Write every photo with every type and level, its pristine original, and opinions.csv."""
    kinds = sorted(types or KADID_TYPES)
    for kind in kinds:
        if kind not in KADID_TYPES:
            raise typer.BadParameter(f"--type must be one of 1 to {len(KADID_TYPES)}, got {kind}")
    rows = []
    for picture in distort(find_photos([photos])[:count], output, kinds, seed):
        mean, spread = kadid_opinion(picture.kind, picture.level)
        rows.append([picture.file.name, f"{mean:.4f}", f"{spread:.4f}", picture.reference.name])
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([["file", "mos", "std", "reference"], *rows])
    write_text(output / "opinions.csv", table.getvalue())
    print(f"{len(rows)} images and {output / 'opinions.csv'}")


if __name__ == "__main__":
    typer.run(main)
