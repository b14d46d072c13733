"""Score tables that survive a crash.

While a run is under way, its rows go one by one, as JSON lines, to `OUTPUT.partial.jsonl` beside the output. At the
end the whole table is written under a temporary name and renamed. So a killed run loses the batch in work and nothing
else, and the output is at any time either the old table or the whole new one.

A later run with `resume` keeps a row if the metric's identity, and path, size and time of last change of the image
file, are the same. Rows without a score are made again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Generic

from ..errors import InputError, OutputError
from ..files import file_key
from .score_rows import SUFFIXES, Row, ScoreRow, json_line, read_rows, write_rows

SECONDS_BETWEEN_SYNCS = 5.0
HAS_LOCKS = find_spec("fcntl") is not None  # not on Windows, where a second run is not refused


class ScoreTable(Generic[Row]):
    """A table in the making; a context manager.

    Creating one locks the table and raises what can be known to fail, so do it before loading a model; nothing that
    earlier runs left is changed. Then `open`, score what is `unfinished`, `add` each row, `finish`.

    Args:
        output: File that ends in .csv, .jsonl or .parquet (which needs pyarrow).
        resume: Go on from the output and from what an interrupted run left, if they exist.
        overwrite: Start again; the old output stays until the new one is whole.
        row_type: `ScoreRow`, or a dataclass derived from it with more columns of str, float or int.

    Attributes:
        partial: File of the rows of a run that is under way or was interrupted. Its lock is that of the table.
        rows: All rows so far, also of earlier runs, by `file_key`.

    Raises:
        InputError: An impossible output; one that exists, without `resume` or `overwrite`; or another process is
            writing it.
        OutputError: Nothing can be written there.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        resume: bool = False,
        overwrite: bool = False,
        row_type: type[Row] = ScoreRow,  # type: ignore[assignment]
    ) -> None:
        self.output = Path(output)
        self.partial = self.output.with_name(self.output.name + ".partial.jsonl")
        self.rows: dict[str, Row] = {}
        self._row_type = row_type
        self._resume = resume
        self._last_sync = time.monotonic()
        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other")
        suffix = self.output.suffix.lower()
        if suffix not in SUFFIXES:
            raise InputError(f"the output must end in {', '.join(SUFFIXES)}, not {str(output)!r}")
        if suffix == ".parquet" and not find_spec("pyarrow"):
            raise InputError("parquet needs pyarrow: install it, or write .csv")
        if not self.output.parent.is_dir():
            raise InputError(f"the folder of the output does not exist: {self.output.parent}")
        if self.output.is_dir():
            raise InputError(f"the output is a folder: {self.output}")
        try:
            self._file: BinaryIO | None = _open_alone(self.partial)
            self._length = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise OutputError(f"cannot write {self.partial}: {error.strerror}") from error
        # Only under the lock: a run that has just ended may have made the output.
        if (self._length or self.output.exists()) and not resume and not overwrite:
            self.close()
            if self._length:
                raise InputError(
                    f"{self.partial} has the rows of an interrupted run: --resume goes on with them, "
                    "--overwrite starts again"
                )
            raise InputError(f"{self.output} exists: --resume adds to it, --overwrite replaces it")

    def open(self, metric: str, identity: str) -> ScoreTable[Row]:
        """Empty the partial file or, with `resume`, read the rows of earlier runs.

        Raises:
            InputError: Those rows come from another checkpoint or other options, or are not ours.
            OutputError: The partial file cannot be written.
        """
        try:
            if self._file is None:
                raise ValueError("the table is closed")
            # What follows the last line break is of the line that a killed run was writing.
            self._length = self.partial.read_bytes().rfind(b"\n") + 1 if self._resume else 0
            self._file.truncate(self._length)
            if self._resume:
                earlier = read_rows(self.output, self._row_type) if self.output.exists() else []
                for row in earlier + read_rows(self.partial, self._row_type):
                    self._check(row, metric, identity)
                    self.rows[file_key(row.path)] = row
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise OutputError(f"cannot write {self.partial}: {error.strerror}") from error
            raise
        return self

    def __enter__(self) -> ScoreTable[Row]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def unfinished(self, paths: Iterable[str]) -> list[str]:
        """The `paths` that no earlier run has scored, or whose file has changed since."""
        return [path for path in paths if not self._is_scored(path)]

    def absorb(self, parts: Iterable[Path], metric: str, identity: str) -> None:
        """Take over the rows of other JSON-lines tables, also of interrupted runs, and remove those files.

        Raises:
            InputError, OutputError: As `open`, as `add`.
        """
        for part in parts:
            for row in read_rows(part, self._row_type):
                self._check(row, metric, identity)
                self.add(row)
            part.unlink()

    def add(self, row: Row) -> None:
        """Write one row; it survives the end of this process, and within seconds a power cut. Raises `OutputError`."""
        if self._file is None:
            raise ValueError("the table is closed")
        line = json_line(row)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            if time.monotonic() - self._last_sync > SECONDS_BETWEEN_SYNCS:
                os.fsync(self._file.fileno())
                self._last_sync = time.monotonic()
        except OSError as error:
            self._file.truncate(self._length)
            raise self._write_problem(self.partial, error) from error
        self._length += len(line)
        self.rows[file_key(row.path)] = row

    def finish(self, paths: Sequence[str]) -> None:
        """Write the output, rows in the order of `paths` after those of other files, and remove the partial file.

        Raises `OutputError` where that cannot be done; all rows are then kept in the partial file.
        """
        chosen = dict.fromkeys(map(file_key, paths))
        rows = [row for key, row in self.rows.items() if key not in chosen]
        rows += [self.rows[key] for key in chosen if key in self.rows]
        try:
            write_rows(self.output, rows, self._row_type)
        except OSError as error:
            raise self._write_problem(self.output, error) from error
        self._length = 0  # nothing is left that only the partial file has
        self.close()

    def close(self) -> None:
        """Close the partial file, and remove it if it has nothing that is needed."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            with file:
                if self._length:
                    os.fsync(file.fileno())
                elif HAS_LOCKS:
                    self.partial.unlink()  # while it is locked: afterwards it may be another run's
            if not self._length and not HAS_LOCKS:
                self.partial.unlink()
        except OSError as error:
            raise self._write_problem(self.partial, error) from error

    def _write_problem(self, path: Path, error: OSError) -> OutputError:
        kept = f"{len(self.rows)} finished rows are kept; put it right and resume"
        return OutputError(f"cannot write {path}: {error.strerror}. {kept}")

    def _check(self, row: Row, metric: str, identity: str) -> None:
        if row.identity != identity:
            raise InputError(
                f"cannot resume {self.output}: its scores were made by {row.metric} with identity "
                f"{row.identity}, but this run is {metric} with identity {identity} (another "
                "checkpoint or other options). Use the same options, another output, or --overwrite"
            )

    def _is_scored(self, path: str) -> bool:
        row = self.rows.get(file_key(path))
        return row is not None and row.score is not None and row.is_current()


def _open_alone(path: Path) -> BinaryIO:
    """Open for appending, under a lock that ends with the file. Raises `InputError` if another run has it."""
    while True:
        file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by ScoreTable.close)
        try:
            if HAS_LOCKS:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    return file
        except OSError as error:
            file.close()
            if isinstance(error, BlockingIOError):
                raise InputError(f"another run is writing {path}: wait for it to end") from error
            raise
        file.close()  # a run that ended between the two calls has removed it
