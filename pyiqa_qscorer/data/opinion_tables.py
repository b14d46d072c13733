"""MOS and their spread out of a table of any length, mapped to 1 (worst) .. 5 (best).

The table is read once, in chunks; its numbers go to an unnamed temporary file (16 bytes per image), which later passes
read in chunks again. Memory does not grow with the table.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..errors import OpinionsError
from .labels import Floats

LOW, HIGH = 1.0, 5.0

CHUNK = 100_000  # rows


@dataclass(frozen=True)
class OpinionColumns:
    """Where a table holds its opinions, and on which scale.

    Attributes:
        mos, std: names of columns. `mos` None: the only column named MOS, in any case, unless there are `votes`.
        votes: columns with the number or share of votes for score 1, 2, ...; MOS and, without `std`, the spread are
            theirs.
        range: of the MOS; None: the smallest and largest MOS of the table.
        std_range: of the scale that the spreads are on; None: that of the MOS. KonIQ-10k gives MOS on 0..100 and
            spreads on 1..5.
        lower_better: small MOS mean good quality (DMOS).
        skip_rows: first rows to leave out, such as training pictures.
    """

    mos: str | None = None
    std: str | None = None
    votes: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    std_range: tuple[float, float] | None = None
    lower_better: bool = False
    skip_rows: int = 0


@dataclass
class Opinions:
    """The opinions of a dataset; `chunks` gives the numbers.

    Attributes:
        path: the table.
        mos_column: None where votes make the MOS.
        images: rows with a MOS.
        missing_mos: rows left out, their MOS being absent or no finite number.
        missing_std: of `images`, those without a finite spread; equals `images` where the table has no spreads.
        zero_std: of `images`, those whose spread is 0 (all people agreed, or one was asked).
        low, high: range that was mapped to 1..5.
        own_range: the range is the table's own smallest and largest MOS.
        lower_better: small MOS were good ones.
        vote_shares: (K,) mean share of votes per score, None without vote columns. Of `lower_better`: lowest quality
            first.
    """

    path: Path
    mos_column: str | None
    images: int
    missing_mos: int
    missing_std: int
    zero_std: int
    low: float
    high: float
    own_range: bool
    lower_better: bool
    vote_shares: Floats | None
    _std_low: float
    _std_high: float
    _file: IO[bytes]

    @property
    def has_std(self) -> bool:
        return self.missing_std < self.images

    def chunks(self, rows: int = CHUNK) -> Iterator[tuple[Floats, Floats]]:
        """MOS and spread on 1..5, (n,) each, in the order of the table; the spread is NaN where there is none."""
        self._file.seek(0)
        while block := self._file.read(16 * rows):
            pairs = np.frombuffer(block, dtype=np.float64).reshape(-1, 2)
            yield (
                normalise_mos(pairs[:, 0], self.low, self.high, self.lower_better),
                normalise_std(pairs[:, 1], self._std_low, self._std_high),
            )

    def sample(self, size: int, seed: int = 0, only_with_std: bool = False) -> tuple[Floats, Floats]:
        """MOS and spread of at most `size` images: all, in order, or as many drawn without replacement."""
        generator = np.random.default_rng(seed)
        kept = np.zeros((0, 3))
        count = 0
        for mos, std in self.chunks():
            # The images with the smallest of independent random keys are a uniform sample.
            rows = np.stack([generator.random(len(mos)), mos, std], axis=1)
            rows = rows[np.isfinite(std)] if only_with_std else rows
            count += len(rows)
            kept = np.concatenate([kept, rows])
            if count > size:
                kept = kept[np.argpartition(kept[:, 0], size - 1)[:size]]
        return kept[:, 1], kept[:, 2]


def read_opinion_table(path: Path, columns: OpinionColumns = OpinionColumns()) -> Opinions:
    """Read a CSV file.

    Raises:
        OpinionsError: no such file or column; no usable MOS, or only one value; a MOS outside the stated range, a
            negative spread or number of votes, with its line.
    """
    names = _column_names(path, columns)
    file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (`Opinions` keeps it; it vanishes with it)
    images = missing_mos = missing_std = zero_std = 0
    low, high = np.inf, -np.inf
    votes_sum = np.zeros(len(columns.votes))
    for table in _tables(path, names, columns.skip_rows):
        numbers = {name: _numbers(table[name]) for name in names}
        for name in (*columns.votes, *([columns.std] if columns.std else [])):
            _refuse_negative(path, name, numbers[name], table.index)
        if columns.votes:
            mos, std, shares = _of_votes(np.stack([numbers[name] for name in columns.votes], axis=1))
            votes_sum += np.nansum(shares, axis=0)
        else:
            mos, std = numbers[names[0]], np.full(len(table), np.nan)
        std = numbers[columns.std] if columns.std else std
        usable = np.isfinite(mos)
        mos, std = mos[usable], np.where(np.isfinite(std), std, np.nan)[usable]
        images, missing_mos = images + len(mos), missing_mos + int((~usable).sum())
        missing_std += int(np.isnan(std).sum())
        zero_std += int((std == 0).sum())
        if len(mos):
            low, high = min(low, float(mos.min())), max(high, float(mos.max()))
        file.write(np.stack([mos, std], axis=1).tobytes())
    if not images:
        raise OpinionsError(f"{path} has no usable MOS ({missing_mos} rows without a finite number)")
    scale = columns.range or (low, high)
    slack = 1e-6 * (scale[1] - scale[0])
    if low < scale[0] - slack or high > scale[1] + slack:
        raise OpinionsError(f"{path}: MOS go from {low} to {high}, outside the stated range {scale}; correct --range")
    if low == high and columns.range is None:
        raise OpinionsError(f"{path}: every MOS is {low}; state the range of the scale with --range LOW HIGH")
    mean_votes = votes_sum / votes_sum.sum() if columns.votes else None
    return Opinions(
        path=path,
        mos_column=None if columns.votes else names[0],
        images=images,
        missing_mos=missing_mos,
        missing_std=missing_std,
        zero_std=zero_std,
        low=scale[0],
        high=scale[1],
        own_range=columns.range is None,
        lower_better=columns.lower_better,
        vote_shares=mean_votes[::-1] if mean_votes is not None and columns.lower_better else mean_votes,
        _std_low=(columns.std_range or scale)[0],
        _std_high=(columns.std_range or scale)[1],
        _file=file,
    )


def _column_names(path: Path, columns: OpinionColumns) -> list[str]:
    """Columns to read, the MOS first; all checked to be there."""
    for option, stated in (("--range", columns.range), ("--std-range", columns.std_range)):
        if stated is not None and not (np.isfinite(stated).all() and stated[0] < stated[1]):
            raise OpinionsError(f"{option} must be LOW HIGH, finite, with LOW < HIGH, got {stated}")
    if columns.skip_rows < 0:
        raise OpinionsError(f"--skip-rows must be >= 0, got {columns.skip_rows}")
    if columns.votes and columns.mos:
        raise OpinionsError("give either --mos-column or --vote-columns: the votes make a MOS of their own")
    if len(columns.votes) == 1 or len(set(columns.votes)) < len(columns.votes):
        raise OpinionsError(f"--vote-columns must be two or more different columns, got {' '.join(columns.votes)}")
    there = _read(path, nrows=0).columns.tolist()
    wanted = list(columns.votes) or [columns.mos or _only_mos_column(path, there)]
    wanted += [columns.std] if columns.std and columns.std not in wanted else []
    if missing := [name for name in wanted if name not in there]:
        raise OpinionsError(f"{path} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(there)}")
    return wanted


def _only_mos_column(path: Path, there: Sequence[str]) -> str:
    named = [name for name in there if name.strip().lower() == "mos"]
    if len(named) != 1:
        raise OpinionsError(f"say with --mos-column which column of {path} is the MOS: {', '.join(there)}")
    return named[0]


def _tables(path: Path, names: list[str], skip_rows: int) -> Iterator[pd.DataFrame]:
    """The wanted columns, chunk by chunk, indexed by the line of the file."""
    # All columns are parsed: with a selection pandas overlooks lines that have too many.
    chunks = _read(path, chunksize=CHUNK, skiprows=range(1, 1 + skip_rows), low_memory=False)
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # too many columns in every line
                table = next(chunks)[names]
        except StopIteration:
            return
        except (ValueError, OSError, pd.errors.ParserWarning) as error:  # pandas' own errors are of these kinds
            raise OpinionsError(f"{path} cannot be read: {error}") from error
        table.index += 2 + skip_rows
        yield table


def _read(path: Path, **options: Any) -> Any:
    try:
        return pd.read_csv(path, encoding="utf-8-sig", index_col=False, **options)
    except (ValueError, OSError) as error:
        raise OpinionsError(f"{path} cannot be read: {error}") from error


def _numbers(column: pd.Series) -> Floats:
    return pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)


def _of_votes(votes: Floats) -> tuple[Floats, Floats, Floats]:
    """MOS, spread and shares of (n, K) votes for the scores 1..K; NaN where a count is missing or nobody voted."""
    scores = np.arange(1, votes.shape[1] + 1)
    total = votes.sum(axis=1, keepdims=True)
    shares = np.divide(votes, total, out=np.full_like(votes, np.nan), where=total > 0)
    mos = shares @ scores
    variance = np.sum(shares * (scores - mos[:, None]) ** 2, axis=1)
    return mos, np.sqrt(variance), shares


def _refuse_negative(path: Path, name: str, values: Floats, lines: pd.Index) -> None:
    bad = np.flatnonzero(values < 0)
    if len(bad):
        raise OpinionsError(
            f"{path}, line {lines[bad[0]]}: {name} must be >= 0, got {values[bad[0]]} ({len(bad)} such in these rows)"
        )


def normalise_mos(mos: ArrayLike, low: float, high: float, lower_better: bool = False) -> Floats:
    """MOS on low..high -> 1 (worst)..5 (best): 1 + 4 (mos - low) / (high - low), mirrored for `lower_better`."""
    share = (np.asarray(mos, dtype=np.float64) - low) / (high - low)
    return LOW + (HIGH - LOW) * (1.0 - share if lower_better else share)


def normalise_std(std: ArrayLike, low: float, high: float) -> Floats:
    """Spread of single opinions on low..high -> on 1..5."""
    return np.asarray(std, dtype=np.float64) * (HIGH - LOW) / (high - low)
