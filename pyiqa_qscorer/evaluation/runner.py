"""The leaderboard: every metric on every dataset, image by image, into tables that a later run goes on with.

In the output folder, per dataset and metric:

    scores/DATASET/METRIC.csv     a row per image (`BenchmarkRow`), written as the run goes
    scores/DATASET/METRIC.json    what made it: versions, fingerprint of the weights, options, cost

Correlations and reports are computed from these files (`results`, `report`), so nothing else needs to be kept.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..data.opinions import OpinionRow
from ..data.score_files import file_key
from ..data.score_table import ScoreTable
from ..errors import InputError, OutputError
from ..host.metric_protocol import BenchmarkMetric, MetricDescription, Metrics
from .benchmark_files import MACHINE_FACTS, read_facts, table_path, write_text
from .cost import PeakMemory, machine_facts
from .datasets import OpenDataset
from .processes import Processes
from .scoring import BenchmarkRow, one_line, score_rows

RUN_FACTS = ("batch_size", "processes", "device", *MACHINE_FACTS, "peak_memory_bytes")
FORBIDDEN_IN_LABELS = set('/\\:*?"<>|')


@dataclass(frozen=True)
class MetricSpec:
    """A metric as a user asks for it: its name in the results, its name in pyiqa, its options."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A metric that could not run on a dataset, and why."""

    metric: str
    dataset: str
    reason: str


Progress = Callable[[str, str, int, int], AbstractContextManager[Callable[[BenchmarkRow], None]]]
"""Called with metric, dataset, number of images to score, number scored before; what it yields takes each row."""


def _nobody_watches(metric: str, dataset: str, images: int, before: int) -> AbstractContextManager[Any]:
    return nullcontext(lambda row: None)


def run_benchmark(
    specs: Sequence[MetricSpec],
    datasets: Sequence[OpenDataset],
    output: Path,
    available: Metrics,
    processes: Processes,
    *,
    batch_size: int = 1,
    workers: int = 4,
    overwrite: bool = False,
    progress: Progress = _nobody_watches,
) -> list[Problem]:
    """Score every dataset with every metric; what earlier runs scored is kept.

    Images are scored again only if their file, or their reference's, has changed, or if they failed. Interrupted or
    killed at any moment, the same call goes on. With several processes every one scores its share of the images, and
    process 0 writes the tables.

    Args:
        output: folder, made if missing.
        available: all metrics, such as `pyiqa_qscorer.host.pyiqa_metrics.PyiqaMetrics()`.
        batch_size: images of one shape per pass. 1 gives the same bits whatever was scored before.
        workers: threads that read images.
        overwrite: score everything again.

    Returns:
        What could not run at all: a metric that cannot be built, a full-reference one without references. The other
        metrics have gone on.

    Raises:
        InputError: two things of one label; or scores in the output were made with other weights or options.
        OutputError: the output cannot be written.
        QScorerError: an unknown metric.
    """
    _check_labels([(spec.label, spec.name) for spec in specs], "metric")
    _check_labels([(dataset.label, dataset.source) for dataset in datasets], "dataset")
    described = [available.describe(spec.name) for spec in specs]
    problems: list[Problem] = []
    for spec, description in zip(specs, described, strict=True):
        todo = []
        for dataset in datasets:
            reason = dataset.missing_references() if description.mode == "FR" else None
            if reason is None:
                todo.append(dataset)
            else:
                problems.append(Problem(spec.label, dataset.label, reason))
        if not todo:
            continue
        memory = PeakMemory(processes.device)
        metric: BenchmarkMetric | None = None
        reason = None
        try:
            metric = available.build(spec.name, processes.device, spec.options)
        except Exception as error:  # metrics are foreign code and raise anything: the others go on
            reason = f"cannot be built: {one_line(error)}"
        reason = next((other for other in processes.gather(reason) if other), None)
        if reason is not None or metric is None:
            problems += [Problem(spec.label, dataset.label, str(reason)) for dataset in todo]
            continue
        for dataset in todo:
            pair = _Pair(spec, description, metric, dataset, output, processes)
            memory.restart()
            pair.run(memory, batch_size, workers, overwrite, progress)
        del metric
        gc.collect()
        if processes.device.type == "cuda":
            torch.cuda.empty_cache()
    if processes.index == 0:
        for problem in problems:
            _record(problem, output, specs, described, datasets)
    processes.gather(None)
    return problems


class _Pair:
    """One metric on one dataset."""

    def __init__(
        self,
        spec: MetricSpec,
        description: MetricDescription,
        metric: BenchmarkMetric,
        dataset: OpenDataset,
        output: Path,
        processes: Processes,
    ) -> None:
        self.spec, self.description, self.metric = spec, description, metric
        self.dataset, self.processes = dataset, processes
        self.with_reference = description.mode == "FR"
        self.identity = metric.facts.identity
        if dataset.changes:
            self.identity = hashlib.sha256(f"{self.identity} {dataset.changes}".encode()).hexdigest()[:16]
        self.table_path = table_path(output, dataset.label, spec.label)
        self.facts_path = self.table_path.with_suffix(".json")

    def run(self, memory: PeakMemory, batch_size: int, workers: int, overwrite: bool, progress: Progress) -> None:
        processes, first = self.processes, self.processes.index == 0
        with ExitStack() as stack:
            todo: list[OpinionRow] = []
            if first:
                table = stack.enter_context(self._open(self.table_path, resume=not overwrite))
                self._absorb(table, overwrite)
                todo = self._unfinished(table)
            # The others open theirs only now, since it may have rows of a killed run, which process 0 has taken over.
            todo = processes.gather(todo)[0]
            if not first:
                table = stack.enter_context(self._open(self._part(processes.index), resume=False))
            share = todo[processes.index :: processes.count]
            watch = progress if first else _nobody_watches
            with watch(self.spec.label, self.dataset.label, len(share), len(self.dataset.rows) - len(todo)) as advance:
                for row in score_rows(
                    self.metric,
                    share,
                    self.spec.label,
                    self.identity,
                    with_reference=self.with_reference,
                    transform=self.dataset.transform,
                    batch_size=batch_size,
                    workers=workers,
                ):
                    table.add(row)
                    advance(row)
            if not first:
                table.finish([row.path for row in share])
            peaks = [peak for peak in processes.gather(memory.bytes()) if peak is not None]
            if first:
                self._absorb(table, overwrite=False)
                self._finish(table)
                run = {
                    "batch_size": batch_size,
                    "processes": processes.count,
                    "device": _device_name(processes.device),
                    **machine_facts(),
                    "peak_memory_bytes": max(peaks, default=None),
                }
                self._write_facts(run if todo else {})
        processes.gather(None)

    def _open(self, path: Path, resume: bool) -> ScoreTable[BenchmarkRow]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {path.parent}: {error.strerror}") from error
        return ScoreTable(path, resume, not resume, BenchmarkRow).open(self.spec.label, self.identity)

    def _part(self, index: int) -> Path:
        return self.table_path.with_suffix(f".part-{index}.jsonl")

    def _absorb(self, table: ScoreTable[BenchmarkRow], overwrite: bool) -> None:
        """Take over what other processes scored, in this run or in one that was killed."""
        start = f"{self.table_path.stem}.part-"
        parts = sorted(path for path in self.table_path.parent.iterdir() if path.name.startswith(start))
        if overwrite:
            for part in parts:
                part.unlink()
        else:
            table.absorb(parts, self.spec.label, self.identity)

    def _unfinished(self, table: ScoreTable[BenchmarkRow]) -> list[OpinionRow]:
        open_paths = set(table.unfinished(row.path for row in self.dataset.rows))
        return [row for row in self.dataset.rows if row.path in open_paths or self._other_reference(table, row)]

    def _other_reference(self, table: ScoreTable[BenchmarkRow], row: OpinionRow) -> bool:
        return self.with_reference and table.rows[file_key(row.path)].reference != row.reference

    def _finish(self, table: ScoreTable[BenchmarkRow]) -> None:
        # The opinions are the dataset's of today; an image that is no longer in it keeps its score, without one.
        opinions = {file_key(row.path): row.mos for row in self.dataset.rows}
        for key, row in table.rows.items():
            table.rows[key] = replace(row, mos=opinions.get(key))
        table.finish([row.path for row in self.dataset.rows])

    def _write_facts(self, run: dict[str, Any]) -> None:
        """Facts of the metric and of the run that scored; of an earlier one where this one had nothing to score."""
        earlier = read_facts(self.facts_path) if not run and self.facts_path.exists() else {}
        facts = _facts(self.spec, self.description, self.dataset) | {
            **self.metric.facts.as_dict(),
            "identity": self.identity,
            **{key: earlier.get(key) for key in RUN_FACTS},
            **run,
            "problem": None,
        }
        write_text(self.facts_path, json.dumps(facts, indent=2) + "\n")


def _facts(spec: MetricSpec, description: MetricDescription, dataset: OpenDataset) -> dict[str, Any]:
    return {
        "metric": spec.label,
        "name": spec.name,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in spec.options.items()},
        "mode": description.mode,
        "lower_better": description.lower_better,
        "dataset": dataset.label,
        "dataset_facts": dataset.facts,
        "notes": dataset.notes,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _record(
    problem: Problem,
    output: Path,
    specs: Sequence[MetricSpec],
    described: Sequence[MetricDescription],
    datasets: Sequence[OpenDataset],
) -> None:
    """Keep a problem for the report, unless an earlier run left scores of that pair."""
    path = table_path(output, problem.dataset, problem.metric)
    if path.exists():
        return
    number = [spec.label for spec in specs].index(problem.metric)
    dataset = next(dataset for dataset in datasets if dataset.label == problem.dataset)
    facts = _facts(specs[number], described[number], dataset) | {"problem": problem.reason}
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")


def _check_labels(labelled: Sequence[tuple[str, str]], what: str) -> None:
    """Check (label, what it stands for) pairs."""
    seen = set()
    for label, source in labelled:
        if label in seen:
            raise InputError(f"two {what}s are called {label!r}: give one another name, NEWNAME={source}")
        if not label or label.startswith(".") or FORBIDDEN_IN_LABELS & set(label):
            raise InputError(f"{what} {label!r} cannot name a file: give another name, NEWNAME={source}")
        seen.add(label)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
