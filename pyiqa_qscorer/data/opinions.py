"""Human opinions of images: the rows of a dataset, read from a folder and a CSV file or given by name."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..errors import OpinionTableError

if TYPE_CHECKING:
    from PIL import Image


class OpinionRow(NamedTuple):
    """One judged image, on the dataset's own scale.

    Attributes:
        path: The image file.
        mos: Mean opinion; NaN where the table has none.
        std: Spread of the opinions; None where the dataset has none.
        reference: File of the undistorted image; None where there is none.
    """

    path: str
    mos: float
    std: float | None = None
    reference: str | None = None


class NamedDatasets(Protocol):
    """Opens the datasets that are known by name (`pyiqa_qscorer.host.pyiqa_datasets.pyiqa_dataset`)."""

    def __call__(
        self, name: str, data_root: Path, options: dict[str, Any], *, download: bool = False
    ) -> tuple[list[OpinionRow], dict[str, Any]]:
        """Rows, and the dataset's facts: `mos_range`, `lower_better`, and `transform` (a `Transform`) if it has one."""
        ...


Transform = Callable[[Sequence["Image.Image"]], "list[Image.Image]"]
"""What a dataset does to an image, or to image and reference alike, before it is scored."""


def read_opinions(
    table: Path,
    folder: Path,
    *,
    file_column: str | None = None,
    mos_column: str | None = None,
    std_column: str | None = None,
    reference_column: str | None = None,
    reference_folder: Path | None = None,
    split_column: str | None = None,
    phase: str | None = None,
) -> list[OpinionRow]:
    """Rows of a CSV file with a header.

    Args:
        table: the CSV file.
        folder: where its images lie.
        file_column, mos_column: default the first and the second column.
        std_column, reference_column: not read by default.
        reference_folder: where the references lie; default `folder`.
        split_column, phase: only the rows that have `phase` in that column.

    Raises:
        OpinionTableError: the file cannot be read, or has no such column.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OpinionTableError(f"csv {table} cannot be read: {error}") from error
    wanted = {
        "file_column": file_column or (columns[0] if columns else ""),
        "mos_column": mos_column or (columns[1] if len(columns) > 1 else ""),
        "std_column": std_column,
        "reference_column": reference_column,
        "split_column": split_column,
    }
    for option, column in wanted.items():
        if column is not None and column not in columns:
            raise OpinionTableError(f"{option} {column!r} is not in {table}; its columns are {', '.join(columns)}")

    def cell(row: dict[str, Any], option: str) -> str | None:
        column = wanted[option]
        return None if column is None else row[column]

    return [
        OpinionRow(
            path=str(folder / (cell(row, "file_column") or "")),
            mos=number(cell(row, "mos_column")),
            std=None if std_column is None else number(cell(row, "std_column")),
            reference=str((reference_folder or folder) / name) if (name := cell(row, "reference_column")) else None,
        )
        for row in rows
        if split_column is None or row[split_column] == phase
    ]


def number(text: str | None) -> float:
    """The number in a cell; NaN where there is none."""
    try:
        return float(text) if text else math.nan
    except ValueError:
        return math.nan
