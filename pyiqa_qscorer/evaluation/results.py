"""Leaderboard entries from the tables of a benchmark: agreement, its uncertainty, who is really better, cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..data.score_rows import read_rows
from ..errors import InputError
from .bootstrap import LEVEL, RESAMPLES, Resampled, compare, holm, intervals, resample
from .correlation import Correlations, Floats, correlations
from .scoring import BenchmarkRow

SIGNIFICANCE = 1 - LEVEL
WRONG_DIRECTION = -0.2
"""Median SRCC of a dataset below which its opinions are taken to be turned the wrong way round."""
MACHINE_FACTS = ("processor", "cores", "threads")  # of the run that scored; facts files of older versions lack them


def table_path(output: Path, dataset: str, metric: str) -> Path:
    """Table of a metric on a dataset."""
    return output / "scores" / dataset / f"{metric}.csv"


def read_facts(path: Path) -> dict[str, Any]:
    """Content of a facts file; None for machine facts that it lacks. Raises `InputError` if it is none."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): delete it and run the benchmark again") from error
    if not isinstance(facts, dict) or "dataset" not in facts:
        raise InputError(f"{path} is not of a benchmark: delete it, or use another output folder")
    return dict.fromkeys(MACHINE_FACTS) | facts


@dataclass
class Entry:
    """One metric on one dataset.

    Attributes:
        facts: Content of its facts file.
        rows: Those of the images that are in the dataset; the failed ones have an `error`.
        agreement: Of the images that have a score, both sides turned so that higher is better.
        intervals: 95 % bootstrap intervals of `srcc`, `plcc`, `krcc`, `plcc_fitted`.
        better_than: Metrics whose SRCC here is lower beyond chance (Holm-adjusted p < 0.05).
        not_worse_than_best: No metric is better beyond chance than this one. Of a dataset whose direction looks wrong
            (`Leaderboard.wrong_direction`) no metric is marked.
    """

    facts: dict[str, Any]
    rows: list[BenchmarkRow]
    agreement: Correlations
    intervals: dict[str, tuple[float, float] | None]
    better_than: list[str] = field(default_factory=list)
    not_worse_than_best: bool = False

    @property
    def metric(self) -> str:
        return str(self.facts["metric"])

    @property
    def dataset(self) -> str:
        return str(self.facts["dataset"])

    @property
    def problem(self) -> str | None:
        """Why there is not a single row, or no correlation."""
        return self.facts.get("problem") or self.agreement.problem

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
        times = [row.seconds for row in self.rows if row.seconds is not None]
        return median(times) if times else None

    @property
    def images_per_second(self) -> float | None:
        """Of the metric alone, at the batch size of the run."""
        times = [row.seconds for row in self.rows if row.seconds is not None]
        return len(times) / sum(times) if times and sum(times) > 0 else None

    def oriented(self, rows: Sequence[BenchmarkRow]) -> tuple[Floats, Floats]:
        """Scores and opinions of `rows`, each (N,) and higher = better."""
        signs = (-1 if self.facts["lower_better"] else 1, -1 if self.facts["dataset_facts"]["lower_better"] else 1)
        values = [[row.score for row in rows], [row.mos for row in rows]]
        scores, mos = (sign * np.array(column, np.float64) for sign, column in zip(signs, values, strict=True))
        return scores, mos


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

    def of(self, dataset: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.dataset == dataset]

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
    """Compute the leaderboard of everything that was scored into an output folder.

    Args:
        resamples, seed: of the bootstrap; the same ones give the same numbers.

    Raises:
        InputError: nothing was scored there, or a file is not of a benchmark.
    """
    entries = []
    for path in sorted((output / "scores").glob("*/*.json")):
        facts = read_facts(path)
        table = path.with_suffix(".csv")
        rows = [row for row in read_rows(table, BenchmarkRow) if row.mos is not None] if table.exists() else []
        entries.append(_entry(facts, rows, resamples, seed))
    if not entries:
        raise InputError(f"{output} holds no results: run pyiqa-qscorer benchmark with this output first")
    worst = -2.0  # what has no SRCC stands last
    entries.sort(key=lambda e: (e.dataset, -(worst if e.agreement.srcc is None else e.agreement.srcc), e.metric))
    board = Leaderboard(entries, [], resamples, seed)
    for dataset in board.datasets:
        among = board.of(dataset)
        found = _compared(dataset, among, resamples, seed)
        board.pairs += found
        for entry in among:
            wins = [pair for pair in found if pair.better == entry.metric]
            entry.better_than = [pair.second if pair.first == entry.metric else pair.first for pair in wins]
        beaten = {metric for entry in among for metric in entry.better_than}
        for entry in among:
            ranked = entry.agreement.srcc is not None and board.wrong_direction(dataset) is None
            entry.not_worse_than_best = ranked and entry.metric not in beaten
    return board


def _entry(facts: dict[str, Any], rows: list[BenchmarkRow], resamples: int, seed: int) -> Entry:
    entry = Entry(facts, rows, Correlations(0), {})
    scores, mos = entry.oriented(entry.scored)
    entry.agreement = correlations(scores, mos)
    fit = entry.agreement.fit
    entry.intervals = intervals(scores, mos, None if fit is None else fit(scores), resamples, seed)
    return entry


def _compared(dataset: str, entries: Sequence[Entry], resamples: int, seed: int) -> list[Pair]:
    """Every pair of metrics, on the images that both scored."""
    drawn: dict[tuple[str, frozenset[str]], Resampled | None] = {}  # most pairs share all images: drawn only once

    def of(entry: Entry, shared: frozenset[str]) -> Resampled | None:
        key = (entry.metric, shared)
        if key not in drawn:
            rows = sorted((row for row in entry.scored if row.path in shared), key=lambda row: row.path)
            drawn[key] = resample(*entry.oriented(rows), resamples, seed)
        return drawn[key]

    found = []
    paths = {entry.metric: frozenset(row.path for row in entry.scored) for entry in entries}
    for first, second in combinations(entries, 2):
        shared = paths[first.metric] & paths[second.metric]
        one, other = of(first, shared), of(second, shared)
        if one is not None and other is not None:
            found.append((first.metric, second.metric, len(shared), compare(one, other)))
    adjusted = holm([result.p for *_, result in found])
    return [
        Pair(dataset, first, second, images, result.difference, result.p, p)
        for (first, second, images, result), p in zip(found, adjusted, strict=True)
    ]
