"""Datasets of the leaderboard: pyiqa's by name, or a CSV file and a folder."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.opinions import OpinionRow, Transform, read_opinions
from ..data.score_rows import ScoreRow, columns_of
from ..errors import OpinionTableError
from ..files import file_key
from ..host.pyiqa_datasets import pyiqa_dataset

COLUMNS = ("file", "mos", "std", "reference", "split")


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset as a user asks for it: `name`, or `csv` with its folders.

    Attributes:
        label: What it is called in the results.
        name: In pyiqa.
        csv: Table of an own dataset: first column the file, second the MOS, and `std` and `reference` where they
            exist; or in pyiqa's full-reference layout `ref_name, dist_name, MOS`; unless `columns` says otherwise.
        images: Where its images lie; default the folder of the table.
        references: Where its references lie; default `images`.
        columns: Column names by role (`COLUMNS`).
        lower_better: Its opinions are DMOS: small numbers mean good quality.
        split: Of pyiqa's dataset (column name or number), or, of an own one, see `columns`.
        phase: `train`, `val` or `test` of a dataset with a split.
        original_size: Leave out the resizing that pyiqa's options ask for.
    """

    label: str
    name: str | None = None
    csv: Path | None = None
    images: Path | None = None
    references: Path | None = None
    columns: dict[str, str] = field(default_factory=dict)
    lower_better: bool = False
    split: str | int | None = None
    phase: str | None = None
    original_size: bool = False


@dataclass(frozen=True)
class OpenDataset:
    """A dataset that was read.

    Attributes:
        source: What it was read from, as the user named it: pyiqa's name or the CSV file.
        rows: Each image once, with a MOS.
        transform: What pyiqa's options ask to do to its pictures; None: nothing.
        facts: Plain values for the report, with `lower_better`: small numbers mean good quality.
        notes: What a reader of the results should know.
    """

    label: str
    source: str
    rows: list[OpinionRow]
    transform: Transform | None
    facts: dict[str, Any]
    notes: list[str]

    @property
    def changes(self) -> str:
        """What is done to a picture before it is scored, in words; empty: nothing."""
        return repr(self.facts["augment"]) if self.transform is not None else ""

    def missing_references(self) -> str | None:
        """Why no full-reference metric can run on it; None if one can."""
        named = [row.reference for row in self.rows if row.reference is not None]
        if not named:
            return f"dataset {self.label} names no reference images"
        if not any(Path(path).is_file() for path in dict.fromkeys(named)):
            return f"dataset {self.label}: none of its reference images exists, e.g. {named[0]}"
        return None


def open_dataset(spec: DatasetSpec, data_root: Path = Path("datasets")) -> OpenDataset:
    """Read a dataset's table and check that it can be scored.

    Raises:
        QScorerError: unknown name, missing folder, file, column or split; no image; one file with two opinions.
    """
    facts: dict[str, Any]
    if spec.name is not None:
        options: dict[str, Any] = {"phase": spec.phase or "test"}
        if spec.split is not None:
            options["split_index"] = spec.split
        rows, facts = pyiqa_dataset(spec.name, data_root, options)
        transform: Transform | None = facts.pop("transform", None)
        lower_better = spec.lower_better or bool(facts.get("lower_better", False))
        facts = {key: facts.get(key) for key in ("mos_range", "augment", "split_index")} | options | {"name": spec.name}
    else:
        rows, transform, lower_better = _own_rows(spec), None, spec.lower_better
        facts = {"csv": spec.csv.name if spec.csv else None, "split": spec.columns.get("split"), "phase": spec.phase}
    if spec.original_size:
        transform = None
    notes = [] if transform is None else [f"pictures changed by pyiqa's options {facts['augment']}"]
    rows, left_out = _usable(spec.label, rows)
    facts |= {"lower_better": lower_better, "images": len(rows), "left_out": left_out}
    return OpenDataset(spec.label, spec.name or str(spec.csv), rows, transform, facts, notes + left_out)


def _own_rows(spec: DatasetSpec) -> list[OpinionRow]:
    assert spec.csv is not None
    unknown = set(spec.columns) - set(COLUMNS)
    if unknown:
        raise OpinionTableError(f"columns: {', '.join(sorted(unknown))} is no role; the roles are {', '.join(COLUMNS)}")
    if not spec.csv.is_file():
        raise OpinionTableError(f"csv {spec.csv} does not exist: check the path")
    images = spec.images or spec.csv.parent
    for option, folder in (("images", images), ("references", spec.references)):
        if folder is not None and not folder.is_dir():
            raise OpinionTableError(f"{option}: the folder {folder} does not exist")
    columns = _usual_columns(_header(spec.csv)) | spec.columns
    refuse_scores(spec.csv, columns.get("mos"), "--columns mos=COLUMN")
    if spec.phase is not None and "split" not in columns:
        raise OpinionTableError(f"phase {spec.phase!r} needs a split column: give columns split=COLUMN for {spec.csv}")
    if spec.phase is None and "split" in columns:
        raise OpinionTableError(
            f"columns split={columns['split']} needs a phase for {spec.csv}: give one of that column's values, such as "
            "phase test"
        )
    by_role = {f"{role}_column": name for role, name in columns.items()}
    return read_opinions(spec.csv, images, reference_folder=spec.references, phase=spec.phase, **by_role)


def refuse_scores(table: Path, mos_column: str | None, option: str) -> None:
    """Raise `OpinionTableError` where the opinions (None: the second column) are scores that this package wrote.

    A correlation of scores with themselves would be 1. `option` is how the user names another column.
    """
    header = _header(table)
    column = mos_column or next(iter(header[1:2]), None)
    if column == "score" and {"score", "metric", "identity"} <= set(header):
        others = [name for name in header if name not in columns_of(ScoreRow)]
        hint = f"one of {', '.join(others)}" if others else "this table has none"
        raise OpinionTableError(
            f"{table}: column 'score' holds scores that pyiqa-qscorer predicted, which are no human opinions; name the "
            f"column of the opinions with {option} ({hint})"
        )


def _header(table: Path) -> list[str]:
    """Names of the columns; none where the file cannot be read, which its reader says better."""
    try:
        with table.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            return next(csv.reader(file), [])
    except OSError:
        return []


def _usual_columns(header: list[str]) -> dict[str, str]:
    columns: dict[str, str] = {name: name for name in ("std", "reference") if name in header}
    if header[:2] == ["ref_name", "dist_name"] and len(header) > 2:  # pyiqa's layout with references
        columns |= {"reference": "ref_name", "file": "dist_name", "mos": header[2]}
    return columns


def _usable(label: str, rows: list[OpinionRow]) -> tuple[list[OpinionRow], list[str]]:
    """Each image once, with a MOS; and what was left out, in words."""
    without_mos = [row for row in rows if not math.isfinite(row.mos)]
    with_mos = [row for row in rows if math.isfinite(row.mos)]
    kept: dict[str, OpinionRow] = {}
    for row in with_mos:
        first = kept.setdefault(file_key(row.path), row)
        if (first.mos, first.reference) != (row.mos, row.reference):
            raise OpinionTableError(
                f"dataset {label}: {row.path} stands twice, with MOS {first.mos:g} (reference {first.reference}) and "
                f"{row.mos:g} (reference {row.reference}): keep the right row"
            )
    if not kept:
        raise OpinionTableError(f"dataset {label} has no image with a MOS: check the columns, split and phase")
    if not any(Path(row.path).is_file() for row in kept.values()):
        example = next(iter(kept.values())).path
        raise OpinionTableError(f"dataset {label}: none of its {len(kept)} images exists, e.g. {example}")
    left_out = []
    if without_mos:
        left_out.append(f"{len(without_mos)} rows without MOS left out, e.g. {without_mos[0].path}")
    if repeated := len(with_mos) - len(kept):
        left_out.append(f"{repeated} rows that repeat another left out")
    return list(kept.values()), left_out
