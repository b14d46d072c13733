"""Rows of score tables, and the files that hold them: csv, jsonl or parquet."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from ..errors import InputError
from ..files import file_stamp, write_bytes

FORMULA_STARTS = ("=", "+", "-", "@")  # a spreadsheet computes cells that begin so


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One image file and its score, higher is better; what is not known is None.

    Attributes:
        error: Why it failed.
        identity: Fingerprint of the checkpoint and of the options that change scores.
        width, height: Of the image as stored.
        bytes, modified: Size of the file when it was read, and time of its last change, ISO 8601 in UTC.
    """

    path: str
    score: float | None = None
    error: str | None = None
    metric: str | None = None
    identity: str | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    modified: str | None = None

    def is_current(self) -> bool:
        """Whether the image file is still the one that was read."""
        return (self.bytes, self.modified) == file_stamp(self.path)


Row = TypeVar("Row", bound=ScoreRow)


def columns_of(row_type: type[ScoreRow]) -> dict[str, Callable[[Any], Any]]:
    """Names of the columns, with what makes the text of a cell a value."""
    hints = get_type_hints(row_type)
    return {field.name: (get_args(hints[field.name]) or (hints[field.name],))[0] for field in fields(row_type)}


def read_rows(path: Path, row_type: type[Row] = ScoreRow) -> list[Row]:  # type: ignore[assignment]
    """All rows of a table; of JSON lines those up to the last whole one. Raises `InputError` if it is none."""
    columns = columns_of(row_type)
    rows: list[Row] = []
    try:
        for cells in _FORMATS[path.suffix.lower()][0](path):
            if not isinstance(cells, dict) or set(cells) != set(columns):
                raise ValueError(f"its columns are not {', '.join(columns)}")
            values: dict[str, Any] = {
                name: None if cells[name] in ("", None) else kind(cells[name]) for name, kind in columns.items()
            }
            if values["path"] is None:
                raise ValueError("it has no path")
            rows.append(row_type(**values))
    except (csv.Error, TypeError, ValueError) as error:
        raise InputError(
            f"cannot resume: row {len(rows) + 1} of {path} is not of a score table ({error}). "
            "Choose another output, or --overwrite"
        ) from error
    return rows


def write_rows(path: Path, rows: Sequence[Row], row_type: type[Row] = ScoreRow) -> None:  # type: ignore[assignment]
    """Write a table in the format that the name of the file says, whole or not at all. Raises `OSError`."""
    write_bytes(path, _FORMATS[path.suffix.lower()][1](rows, columns_of(row_type)))


def _csv_records(path: Path) -> Iterator[Any]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        yield from csv.DictReader(file)


def _jsonl_records(path: Path) -> Iterator[Any]:
    with open(path, "rb") as file:
        yield from (json.loads(line) for line in file if line.endswith(b"\n"))


def _parquet_records(path: Path) -> Iterator[Any]:
    import pandas as pd

    frame = pd.read_parquet(path).astype(object)
    for cells in frame.where(frame.notna(), None).to_dict("records"):
        if isinstance(cells.get("path"), str) and not os.path.lexists(cells["path"]):
            cells["path"] = _undo_utf_8_only(cells["path"])
        yield cells


def _csv(rows: Sequence[ScoreRow], columns: dict[str, Any]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = asdict(row)
        if row.path.startswith(FORMULA_STARTS):
            cells["path"] = f"./{row.path}"  # the same file, and no formula
        writer.writerow(cells.values())
    return text.getvalue().encode("utf-8", "surrogateescape")  # a file name that is not UTF-8 comes out byte for byte


def _jsonl(rows: Sequence[ScoreRow], columns: dict[str, Any]) -> bytes:
    return b"".join(map(json_line, rows))


def json_line(row: ScoreRow) -> bytes:
    """A row as it stands in a file of JSON lines."""
    return json.dumps(asdict(row)).encode("ascii") + b"\n"


def _parquet(rows: Sequence[ScoreRow], columns: dict[str, Any]) -> bytes:
    import pandas as pd

    cells = [
        {name: _utf_8_only(cell) if isinstance(cell, str) else cell for name, cell in asdict(row).items()}
        for row in rows
    ]
    dtypes = {name: {float: "float64", int: "Int64", str: "string"}[kind] for name, kind in columns.items()}
    content: bytes = pd.DataFrame(cells, columns=list(columns)).astype(dtypes).to_parquet(index=False)
    return content


def _utf_8_only(text: str) -> str:
    r"""`text` for a file that holds UTF-8 only: a byte of a file name that is not becomes \xNN."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _undo_utf_8_only(text: str) -> str:
    if os.sep == "\\":  # Windows, where every name is text, and \xab may be a folder
        return text
    escaped = re.compile(rb"\\x([89a-f][0-9a-f])")
    return os.fsdecode(escaped.sub(lambda match: bytes.fromhex(match[1].decode()), os.fsencode(text)))


_FORMATS = {".csv": (_csv_records, _csv), ".jsonl": (_jsonl_records, _jsonl), ".parquet": (_parquet_records, _parquet)}
SUFFIXES = tuple(_FORMATS)
