"""Rows of a score table as csv, jsonl or parquet files."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from ..errors import InputError
from .score_files import ScoreRow

Row = TypeVar("Row", bound=ScoreRow)


def read_rows(path: Path, row_type: type[Row] = ScoreRow) -> list[Row]:  # type: ignore[assignment]
    """All rows of a finished table. Raises `InputError` if it is none."""
    return _READERS[path.suffix.lower()](path, row_type)


def write_rows(path: Path, rows: list[Row], row_type: type[Row], suffix: str) -> None:
    """Write all rows in the format of `suffix`, whatever the name of the file. Raises `OSError`."""
    _WRITERS[suffix](path, rows, row_type)


def columns_of(row_type: type[ScoreRow]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(row_type))


def _kinds(row_type: type[ScoreRow]) -> dict[str, Callable[[Any], Any]]:
    """What makes the text of a cell a value, by column."""
    hints = get_type_hints(row_type)
    kinds: dict[str, Callable[[Any], Any]] = {
        name: (get_args(hints[name]) or (hints[name],))[0] for name in columns_of(row_type)
    }
    return kinds | {"metric": sys.intern, "identity": sys.intern}  # one string, not one per row of a long table


def _rows(records: Iterable[Any], path: Path, row_type: type[Row]) -> list[Row]:
    kinds = _kinds(row_type)
    rows = []
    for number, cells in enumerate(records, start=1):
        try:
            if not isinstance(cells, dict) or set(cells) != set(kinds):
                raise ValueError(f"its columns are not {', '.join(kinds)}")
            values: dict[str, Any] = {
                name: None if cells[name] in ("", None) else kind(cells[name]) for name, kind in kinds.items()
            }
            if values["path"] is None:
                raise ValueError("it has no path")
            rows.append(row_type(**values))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"cannot resume: row {number} of {path} is not of a score table ({error}). "
                "Choose another output, or --overwrite"
            ) from error
    return rows


def read_jsonl(path: Path, row_type: type[Row]) -> list[Row]:
    """Rows up to the last whole line: the one after it is torn by a killed run."""
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise InputError(f"cannot resume: line {number} of {path} is not JSON") from error
    return _rows(records, path, row_type)


def _read_csv(path: Path, row_type: type[Row]) -> list[Row]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            return _rows(csv.DictReader(file), path, row_type)
        except csv.Error as error:
            raise InputError(f"cannot resume: {path} is not a CSV file ({error})") from error


def _read_parquet(path: Path, row_type: type[Row]) -> list[Row]:
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except ValueError as error:
        raise InputError(f"cannot resume: {path} is not a parquet file ({error})") from error
    return _rows(frame.astype(object).where(frame.notna(), None).to_dict("records"), path, row_type)


def _write_jsonl(path: Path, rows: list[Row], row_type: type[Row]) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def _write_csv(path: Path, rows: list[Row], row_type: type[Row]) -> None:
    # surrogateescape: a file name that is not UTF-8 comes out byte for byte.
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns_of(row_type))
        writer.writerows(astuple(row) for row in rows)


def _write_parquet(path: Path, rows: list[Row], row_type: type[Row]) -> None:
    import pandas as pd

    frame = pd.DataFrame([asdict(row) for row in rows], columns=list(columns_of(row_type)))
    dtypes = {
        column: "float64" if kind is float else "Int64" if kind is int else "string"
        for column, kind in _kinds(row_type).items()
    }
    # Parquet holds UTF-8 only; a byte of a file name that is not becomes \\xNN.
    frame["path"] = [os.fsencode(row.path).decode("utf-8", "backslashreplace") for row in rows]
    frame.astype(dtypes).to_parquet(path, index=False)


_READERS: dict[str, Callable[..., Any]] = {".csv": _read_csv, ".jsonl": read_jsonl, ".parquet": _read_parquet}
_WRITERS: dict[str, Callable[..., None]] = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
