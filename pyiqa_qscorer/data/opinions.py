"""Human opinions of images: read from CSV files, and mapped from a dataset's scale to 1 (worst) .. 5 (best)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..errors import OpinionTableError
from .labels import HIGH, LOW, Floats

if TYPE_CHECKING:
    from PIL import Image


class OpinionRow(NamedTuple):
    """One judged image, on the dataset's own scale."""

    path: str
    mos: float  # NaN where the table has none
    std: float | None = None  # of the opinions
    reference: str | None = None  # file of the undistorted image


Transform = Callable[[Sequence["Image.Image"]], "list[Image.Image]"]
"""What a dataset does to an image, or to image and reference alike, before it is scored."""


@dataclass(frozen=True)
class MosScale:
    """A dataset's opinion scale, mapped linearly to 1 (worst) .. 5 (best).

    Attributes:
        low, high: Stated range of the MOS.
        lower_better: Small numbers mean good quality (DMOS of LIVE, CSIQ).
        std_range: Range of the scale that the spreads are on; None: that of the MOS. KonIQ-10k gives MOS on 0..100
            and spreads on 1..5.

    >>> MosScale(0, 100).map_mos([0, 25, 100]).tolist()
    [1.0, 2.0, 5.0]
    """

    low: float
    high: float
    lower_better: bool = False
    std_range: tuple[float, float] | None = None

    def map_mos(self, mos: ArrayLike) -> Floats:
        """1 + 4 (mos - low) / (high - low), mirrored for `lower_better`; float64, the shape of `mos`."""
        share = (np.asarray(mos, dtype=np.float64) - self.low) / (self.high - self.low)
        return LOW + (HIGH - LOW) * (1.0 - share if self.lower_better else share)

    def map_std(self, std: ArrayLike) -> Floats:
        """Spread of single opinions -> on 1..5; float64, the shape of `std`."""
        low, high = self.std_range or (self.low, self.high)
        return np.asarray(std, dtype=np.float64) * (HIGH - LOW) / (high - low)

    def contains(self, mos: ArrayLike) -> bool:
        """Whether every MOS is finite and within the range, but for rounding."""
        slack = 1e-6 * (self.high - self.low)
        values = np.asarray(mos, dtype=np.float64)
        return bool(((values >= self.low - slack) & (values <= self.high + slack)).all())


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
    """Images, which lie in `folder`, and opinions of a CSV file with a header.

    Args:
        file_column, mos_column: Default the first and the second column.
        std_column, reference_column: Not read by default.
        reference_folder: Default `folder`.
        split_column, phase: Only the rows that have `phase` in that column.

    Raises:
        OpinionTableError: The file cannot be read, or has no such column.
    """
    cells = _read(table)
    columns = [*cells.columns, "", ""]
    wanted = {
        "file_column": file_column or columns[0],
        "mos_column": mos_column or columns[1],
        "std_column": std_column,
        "reference_column": reference_column,
        "split_column": split_column,
    }
    for option, column in wanted.items():
        if column is not None and column not in cells.columns:
            raise OpinionTableError(
                f"{option} {column!r} is not in {table}; its columns are {', '.join(cells.columns)}"
            )
    if split_column is not None:
        cells = cells[cells[split_column] == phase]
    files, mos = cells[wanted["file_column"]], _numbers(cells[wanted["mos_column"]])
    std = [None] * len(cells) if std_column is None else _numbers(cells[std_column]).tolist()
    references = [""] * len(cells) if reference_column is None else cells[reference_column]
    return [
        OpinionRow(
            path=str(folder / file),
            mos=float(one),
            std=spread,
            reference=str((reference_folder or folder) / reference) if reference else None,
        )
        for file, one, spread, reference in zip(files, mos, std, references, strict=True)
    ]


@dataclass(frozen=True)
class OpinionColumns:
    """Where a table holds its opinions, and on which scale.

    Attributes:
        mos, std: Names of columns. `mos` None: the only column named MOS, in any case, unless there are `votes`.
        votes: Columns with the number or share of votes for score 1, 2, ..., for MOS and, without `std`, spread.
        range: Of the MOS; None: the smallest and largest MOS of the table.
        std_range, lower_better: As in `MosScale`.
        skip_rows: First rows to leave out, such as training pictures.
    """

    mos: str | None = None
    std: str | None = None
    votes: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    std_range: tuple[float, float] | None = None
    lower_better: bool = False
    skip_rows: int = 0


@dataclass(frozen=True)
class Opinions:
    """The opinions of a dataset without its images.

    Attributes:
        mos: (N,) on 1..5, in the order of the table, rows without a MOS left out.
        std: (N,) on 1..5; NaN where there is none.
        vote_shares: (K,) mean share of votes per score, lowest quality first; None without vote columns.
    """

    path: Path
    mos_column: str | None  # None where votes make the MOS
    mos: Floats
    std: Floats
    missing_mos: int  # rows left out
    scale: MosScale  # what was mapped to 1..5
    own_range: bool  # the range is the table's own smallest and largest MOS
    vote_shares: Floats | None

    @property
    def images(self) -> int:
        return len(self.mos)

    @property
    def missing_std(self) -> int:
        return int(np.isnan(self.std).sum())

    @property
    def zero_std(self) -> int:
        """Images on which all people agreed, or of which one was asked."""
        return int((self.std == 0).sum())

    @property
    def has_std(self) -> bool:
        return self.missing_std < self.images

    def sample(self, size: int, seed: int = 0, only_with_std: bool = False) -> tuple[Floats, Floats]:
        """MOS and spread of at most `size` images: all, in order, or as many drawn without replacement."""
        keys = np.random.default_rng(seed).random(self.images)
        kept = np.flatnonzero(np.isfinite(self.std)) if only_with_std else np.arange(self.images)
        if len(kept) > size:  # those with the smallest of independent random keys are a uniform sample
            kept = kept[np.argpartition(keys[kept], size - 1)[:size]]
        return self.mos[kept], self.std[kept]


def read_opinion_table(path: Path, columns: OpinionColumns = OpinionColumns()) -> Opinions:
    """Opinions of a CSV file with a header.

    Raises:
        OpinionTableError: No such file or column; no usable MOS, or only one value; a MOS outside the stated range, a
            negative spread or number of votes, with its line.
    """
    _check_columns(columns)
    cells = _read(path, columns.skip_rows)
    there = cells.columns.tolist()
    names = list(columns.votes) or [columns.mos or _only_mos_column(path, there)]
    if missing := [name for name in (*names, columns.std) if name is not None and name not in there]:
        raise OpinionTableError(
            f"{path} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(there)}"
        )
    shares = None
    if columns.votes:
        votes = np.stack([_numbers(cells[name], path, name) for name in names], axis=1)
        mos, std, shares = _of_votes(votes)
    else:
        mos, std = _numbers(cells[names[0]]), np.full(len(cells), np.nan)
    if columns.std is not None:
        std = _numbers(cells[columns.std], path, columns.std)
    usable = np.isfinite(mos)
    missing_mos = int((~usable).sum())
    mos, std = mos[usable], np.where(np.isfinite(std), std, np.nan)[usable]
    if not len(mos):
        raise OpinionTableError(f"{path} has no usable MOS ({missing_mos} rows without a finite number)")
    found = (float(mos.min()), float(mos.max()))
    scale = MosScale(*(columns.range or found), columns.lower_better, columns.std_range)
    if found[0] == found[1] and columns.range is None:
        raise OpinionTableError(f"{path}: every MOS is {found[0]}; state the range of the scale with --range LOW HIGH")
    if not scale.contains(found):
        raise OpinionTableError(
            f"{path}: MOS go from {found[0]} to {found[1]}, outside the stated range {columns.range}; correct --range"
        )
    if shares is not None:
        shares = np.nansum(shares, axis=0) / np.nansum(shares)
        shares = shares[::-1] if columns.lower_better else shares
    return Opinions(
        path=path,
        mos_column=None if columns.votes else names[0],
        mos=scale.map_mos(mos),
        std=scale.map_std(std),
        missing_mos=missing_mos,
        scale=scale,
        own_range=columns.range is None,
        vote_shares=shares,
    )


def _check_columns(columns: OpinionColumns) -> None:
    for option, stated in (("--range", columns.range), ("--std-range", columns.std_range)):
        if stated is not None and not (np.isfinite(stated).all() and stated[0] < stated[1]):
            raise OpinionTableError(f"{option} must be LOW HIGH, finite, with LOW < HIGH, got {stated}")
    if columns.skip_rows < 0:
        raise OpinionTableError(f"--skip-rows must be >= 0, got {columns.skip_rows}")
    if columns.votes and columns.mos:
        raise OpinionTableError("give either --mos-column or --vote-columns: the votes make a MOS of their own")
    if len(columns.votes) == 1 or len(set(columns.votes)) < len(columns.votes):
        raise OpinionTableError(f"--vote-columns must be two or more different columns, got {' '.join(columns.votes)}")


def _only_mos_column(path: Path, there: Sequence[str]) -> str:
    named = [name for name in there if name.strip().lower() == "mos"]
    if len(named) != 1:
        raise OpinionTableError(f"say with --mos-column which column of {path} is the MOS: {', '.join(there)}")
    return named[0]


def _read(path: Path, skip_rows: int = 0) -> pd.DataFrame:
    """All cells as text, "" where there is none, indexed by the line of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # too many columns in every line
            skipped = range(1, 1 + skip_rows)
            cells = pd.read_csv(
                path, encoding="utf-8-sig", index_col=False, dtype=str, na_filter=False, skiprows=skipped
            )
    except (ValueError, OSError, pd.errors.ParserWarning) as error:  # pandas' own errors are ValueErrors
        raise OpinionTableError(f"csv {path} cannot be read: {error}") from error
    cells.index += 2 + skip_rows
    return cells.fillna("")


def _numbers(column: pd.Series, path: Path | None = None, name: str = "") -> Floats:
    """NaN where a cell has no number; with `path`, a negative one is refused."""
    values = np.array([number(cell) for cell in column], dtype=np.float64)
    bad = np.flatnonzero(values < 0)
    if path is not None and len(bad):
        line = column.index[bad[0]]
        raise OpinionTableError(f"{path}, line {line}: {name} must be >= 0, got {values[bad[0]]} ({len(bad)} such)")
    return values


def number(text: str) -> float:
    """The number in a cell; NaN where there is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _of_votes(votes: Floats) -> tuple[Floats, Floats, Floats]:
    """MOS, spread and shares of (n, K) votes for the scores 1..K; NaN where a count is missing or nobody voted."""
    scores = np.arange(1, votes.shape[1] + 1)
    total = votes.sum(axis=1, keepdims=True)
    shares = np.divide(votes, total, out=np.full_like(votes, np.nan), where=total > 0)
    mos = shares @ scores
    variance = np.sum(shares * (scores - mos[:, None]) ** 2, axis=1)
    return mos, np.sqrt(variance), shares
