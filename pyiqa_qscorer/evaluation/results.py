"""Leaderboard entries from the tables of a benchmark: agreement, its uncertainty, who is really better, cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..data.score_rows import read_rows
from ..errors import InputError
from .bootstrap import LEVEL, RESAMPLES, ResampledSrcc, compare, holm, intervals, resampled_srcc
from .correlation import Correlations, correlations
from .scoring import BenchmarkRow

SIGNIFICANCE = 1 - LEVEL
WRONG_DIRECTION = -0.2
"""Median SRCC of a dataset below which its opinions are taken to be turned the wrong way round."""


def table_path(output: Path, dataset: str, metric: str) -> Path:
    """Table of a metric on a dataset."""
    return output / "scores" / dataset / f"{metric}.csv"


def read_facts(path: Path) -> dict[str, Any]:
    """Content of a facts file. Raises `InputError` if it is none."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): delete it and run the benchmark again") from error
    if not isinstance(facts, dict) or "dataset" not in facts:
        raise InputError(f"{path} is not of a benchmark: delete it, or use another output folder")
    return facts


@dataclass
class Entry:
    """One metric on one dataset.

    Attributes:
        facts: Content of its facts file.
        rows: Those of the images that are in the dataset; the failed ones have an `error`.
        intervals: 95 % bootstrap intervals of `srcc`, `plcc`, `krcc`, `plcc_fitted`.
        better_than: Metrics whose SRCC here is lower beyond chance (Holm-adjusted p < 0.05).
        not_worse_than_best: No metric is better beyond chance than this one. Of a dataset whose direction looks wrong
            (`Leaderboard.wrong_direction`) no metric is marked.
    """

    facts: dict[str, Any]
    rows: list[BenchmarkRow]
    intervals: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    better_than: list[str] = field(default_factory=list)
    not_worse_than_best: bool = False

    @property
    def metric(self) -> str:
        return str(self.facts["metric"])

    @property
    def dataset(self) -> str:
        return str(self.facts["dataset"])

    @property
    def dmos(self) -> bool:
        """Whether the opinions are turned: lower is better."""
        return bool(self.facts["dataset_facts"]["lower_better"])

    @property
    def signs(self) -> tuple[int, int]:
        """Factors that turn scores and opinions so that higher is better."""
        return -1 if self.facts["lower_better"] else 1, -1 if self.dmos else 1

    @cached_property
    def agreement(self) -> Correlations:
        """Of the images that have a score, both sides turned so that higher is better."""
        return correlations(*self.oriented(self.scored))

    @property
    def problem(self) -> str | None:
        """Why there is not a single row, or no correlation."""
        return self.facts["problem"] or self.agreement.problem

    @property
    def scored(self) -> list[BenchmarkRow]:
        return [row for row in self.rows if row.score is not None]

    @property
    def failures(self) -> list[tuple[str, int]]:
        """Reasons why images failed and how many did for each, most frequent first."""
        return Counter(row.error or "not scored yet" for row in self.rows if row.score is None).most_common()

    @property
    def seconds(self) -> float | None:
        """Median seconds per image; in a run with batches, an image's share of its batch."""
        return median(self._times) if self._times else None

    @property
    def images_per_second(self) -> float | None:
        """Of the metric alone, at the batch size of the run."""
        return len(self._times) / sum(self._times) if sum(self._times) > 0 else None

    @property
    def _times(self) -> list[float]:
        return [row.seconds for row in self.rows if row.seconds is not None]

    def oriented(self, rows: Sequence[BenchmarkRow]) -> tuple[np.ndarray, np.ndarray]:
        """Scores and opinions of `rows`, each (N,) and higher = better."""
        scores = np.array([row.score for row in rows], np.float64)
        mos = np.array([row.mos for row in rows], np.float64)
        return self.signs[0] * scores, self.signs[1] * mos


@dataclass(frozen=True)
class Pair:
    """Two metrics compared on the images of a dataset that both scored.

    Attributes:
        difference: SRCC of `first` minus SRCC of `second`.
        p: Two-sided, paired bootstrap (see `bootstrap.compare`).
        adjusted: `p` adjusted for the number of pairs of this dataset (Holm).
    """

    dataset: str
    first: str
    second: str
    images: int
    difference: float
    p: float
    adjusted: float

    @property
    def better(self) -> str | None:
        """The metric that is better beyond chance."""
        if self.adjusted >= SIGNIFICANCE:
            return None
        return self.first if self.difference > 0 else self.second

    @property
    def worse(self) -> str | None:
        """The other one, if one is better."""
        return {self.first: self.second, self.second: self.first, None: None}[self.better]


@dataclass
class Leaderboard:
    """All entries, by dataset in the order of their names and best SRCC first; and all comparisons."""

    entries: list[Entry]
    pairs: list[Pair]
    resamples: int
    seed: int

    @property
    def datasets(self) -> list[str]:
        return list(dict.fromkeys(entry.dataset for entry in self.entries))

    @property
    def metrics(self) -> list[str]:
        """Best mean SRCC first."""
        found: dict[str, list[float]] = {}
        for entry in self.entries:
            found.setdefault(entry.metric, []).extend([] if entry.agreement.srcc is None else [entry.agreement.srcc])
        return sorted(found, key=lambda name: (-(sum(found[name]) / len(found[name])) if found[name] else 2, name))

    @property
    def alarms(self) -> list[str]:
        """What must not be overlooked, a sentence per dataset (`wrong_direction`)."""
        return [text for dataset in self.datasets if (text := self.wrong_direction(dataset))]

    def of(self, dataset: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.dataset == dataset]

    def ran(self, dataset: str) -> list[Entry]:
        """Entries of metrics that could run."""
        return [entry for entry in self.of(dataset) if entry.rows]

    def wrong_direction(self, dataset: str) -> str | None:
        """What to say where most metrics contradict the opinions, which they do if those are turned wrong; or None."""
        found = [entry.agreement.srcc for entry in self.of(dataset) if entry.agreement.srcc is not None]
        if not found or median(found) > WRONG_DIRECTION:
            return None
        facts = self.of(dataset)[0].facts["dataset_facts"]
        if "csv" not in facts:
            remedy = "check the table of the dataset"
        elif facts["lower_better"]:
            remedy = "are large numbers good quality in this table? Then repeat the command without --dmos"
        else:
            remedy = "are small numbers good quality in this table (DMOS)? Then repeat the command with --dmos"
        return (
            f"{dataset}: most metrics contradict the opinions (median SRCC {median(found):.3f}), so the order of the "
            f"metrics is probably upside down: {remedy}. Nothing is scored again."
        )


def read_leaderboard(output: Path, resamples: int = RESAMPLES, seed: int = 0) -> Leaderboard:
    """Compute the leaderboard of everything that was scored into an output folder; the same `seed`, the same numbers.

    Raises:
        InputError: nothing was scored there, or a file is not of a benchmark.
    """
    entries = []
    for path in sorted((output / "scores").glob("*/*.json")):
        table = path.with_suffix(".csv")
        rows = read_rows(table, BenchmarkRow) if table.exists() else []
        entry = Entry(read_facts(path), [row for row in rows if row.mos is not None])
        scores, mos = entry.oriented(entry.scored)
        fit = entry.agreement.fit
        entry.intervals = intervals(scores, mos, None if fit is None else fit(scores), resamples, seed)
        entries.append(entry)
    if not entries:
        raise InputError(f"{output} holds no results: run pyiqa-qscorer benchmark with this output first")
    # What has no SRCC stands last.
    entries.sort(key=lambda e: (e.dataset, e.agreement.srcc is None, -(e.agreement.srcc or 0), e.metric))
    board = Leaderboard(entries, [], resamples, seed)
    for dataset in board.datasets:
        among = board.of(dataset)
        pairs = _compared(dataset, among, resamples, seed)
        beaten = {pair.worse for pair in pairs}
        for entry in among:
            entry.better_than = [pair.worse for pair in pairs if pair.worse and pair.better == entry.metric]
            ranked = entry.agreement.srcc is not None and board.wrong_direction(dataset) is None
            entry.not_worse_than_best = ranked and entry.metric not in beaten
        board.pairs += pairs
    return board


def _compared(dataset: str, entries: Sequence[Entry], resamples: int, seed: int) -> list[Pair]:
    """Every pair of metrics, on the images that both scored."""
    by_path = [{row.path: row for row in sorted(entry.scored, key=lambda row: row.path)} for entry in entries]

    @cache  # most pairs share all images
    def drawn(number: int, shared: frozenset[str]) -> ResampledSrcc | None:
        rows = [row for path, row in by_path[number].items() if path in shared]
        return resampled_srcc(*entries[number].oriented(rows), resamples, seed)

    found = []
    for first, second in combinations(range(len(entries)), 2):
        shared = frozenset(by_path[first].keys() & by_path[second].keys())
        one, other = drawn(first, shared), drawn(second, shared)
        if one is not None and other is not None:
            found.append((entries[first].metric, entries[second].metric, len(shared), *compare(one, other)))
    adjusted = holm([p for *_, p in found])
    return [Pair(dataset, *pair, adjusted=p) for pair, p in zip(found, adjusted, strict=True)]
