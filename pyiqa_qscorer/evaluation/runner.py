"""The leaderboard: every metric on every dataset, image by image, into tables that a later run goes on with.

In the output folder, per dataset and metric:

    scores/DATASET/METRIC.csv     a row per image (`BenchmarkRow`), written as the run goes
    scores/DATASET/METRIC.json    what made it: versions, fingerprint of the weights, options, cost

Correlations and reports are computed from these files (`results`, `leaderboard_report`), so nothing else is kept.
"""

from __future__ import annotations

import gc
import glob
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..data.opinions import OpinionRow
from ..data.score_store import ScoreTable
from ..errors import InputError, OutputError, QScorerError
from ..files import file_key
from ..host import pyiqa_metrics
from ..host.pyiqa_metrics import MetricDescription, PyiqaMetric
from ..report import write_output
from ..scorer import resolve_device
from .cost import PeakMemory, machine_facts
from .datasets import OpenDataset
from .results import read_facts, table_path
from .scoring import BenchmarkRow, InputReader, one_line, score_rows

RUN_FACTS = ("batch_size", "processes", "device", "processor", "cores", "threads", "peak_memory_bytes")
FORBIDDEN_IN_LABELS = set('/\\:*?"<>|')
LONGEST_WAIT = timedelta(days=7)  # for a process whose images take longer than the others'


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


def start_processes(device: str | None = None) -> tuple[PartialState, torch.device]:
    """This process among those that `accelerate launch` or torchrun started, and the device that it scores on.

    Args:
        device: of one process any; of several `cpu`, `cuda` (each takes its own GPU), or None: CUDA where there is
            one, unless accelerate was told to use the CPU.

    Raises:
        QScorerError: `device` names one GPU for several processes, or does not exist.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and device not in (None, "cpu", "cuda"):
        raise QScorerError(f"device {device!r} cannot be shared by several processes: leave it out, each takes its own")
    if several and device is None and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        device = "cpu"
    chosen = resolve_device(device)
    state = PartialState(cpu=chosen.type == "cpu", timeout=LONGEST_WAIT)
    return state, state.device if several else chosen


def run_benchmark(
    specs: Sequence[MetricSpec],
    datasets: Sequence[OpenDataset],
    output: Path,
    device: str | None = None,
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
        device: as for `start_processes`.
        batch_size: images per pass of our own metrics. 1 gives the same bits whatever was scored before.

    Returns:
        What could not run at all: a metric that cannot be built, a full-reference one without references. The other
        metrics have gone on.

    Raises:
        InputError: two things of one label; or scores in the output were made with other weights or options.
        OutputError: the output cannot be written.
        QScorerError: an unknown metric, an impossible device.
    """
    _check_labels([(spec.label, spec.name) for spec in specs], "metric")
    _check_labels([(dataset.label, dataset.source) for dataset in datasets], "dataset")
    described = [pyiqa_metrics.describe_metric(spec.name) for spec in specs]
    state, where = start_processes(device)
    problems: list[Problem] = []
    for spec, description in zip(specs, described, strict=True):
        todo = []
        for dataset in datasets:
            pair = _Pair(spec, description, dataset, table_path(output, dataset.label, spec.label), state)
            reason = dataset.missing_references() if description.mode == "FR" else None
            if reason is None:
                todo.append(pair)
            else:
                problems.append(pair.cannot_run(reason))
        if not todo:
            continue
        memory = PeakMemory(where)
        metric = _build(spec, where)
        if isinstance(metric, str):
            problems += [pair.cannot_run(metric) for pair in todo]
            continue
        for pair in todo:
            memory.restart()
            pair.run(metric, memory, batch_size, workers, overwrite, progress)
        del metric
        gc.collect()
        if where.type == "cuda":
            torch.cuda.empty_cache()
    state.wait_for_everyone()
    state.destroy_process_group()  # else its threads end the interpreter with an error
    return problems


def _build(spec: MetricSpec, device: torch.device) -> PyiqaMetric | str:
    """The metric, or why it cannot be built, here or in another process."""
    reason = None
    try:
        metric = pyiqa_metrics.PyiqaMetric(spec.name, device, spec.options)
    except Exception as error:  # metrics are foreign code and raise anything: the others go on
        reason = f"cannot be built: {one_line(error)}"
    reason = next(filter(None, gather_object([reason])), None)
    return metric if reason is None else reason


@dataclass(frozen=True)
class _Pair:
    """One metric on one dataset, with the path of its table."""

    spec: MetricSpec
    description: MetricDescription
    dataset: OpenDataset
    path: Path
    state: PartialState

    def cannot_run(self, reason: str) -> Problem:
        """The problem; kept in the facts as well, unless an earlier run left scores."""
        if self.state.is_main_process and not self.path.exists():
            self._write_facts(dict.fromkeys(RUN_FACTS), reason)
        return Problem(self.spec.label, self.dataset.label, reason)

    def run(
        self,
        metric: PyiqaMetric,
        memory: PeakMemory,
        batch_size: int,
        workers: int,
        overwrite: bool,
        progress: Progress,
    ) -> None:
        """Score this process's share of the images that need it; process 0 writes table and facts."""
        first, label, identity = self.state.is_main_process, self.spec.label, metric.facts.identity
        if self.dataset.changes:
            identity = hashlib.sha256(f"{identity} {self.dataset.changes}".encode()).hexdigest()[:16]
        read = InputReader(metric, label, identity, self.description.mode == "FR", self.dataset.transform)
        with ExitStack() as stack:
            todo: list[OpinionRow] = []
            if first:
                table = stack.enter_context(_open_table(self.path, not overwrite, label, identity))
                if overwrite:
                    for part in self._parts():
                        part.unlink()
                table.absorb(self._parts(), label, identity)
                todo = self._unfinished(table)
            # The others open theirs only now, since it may have rows of a killed run, which process 0 has taken over.
            todo = gather_object([todo])[0]
            if not first:
                part = self.path.with_suffix(f".part-{self.state.process_index}.jsonl")
                table = stack.enter_context(_open_table(part, False, label, identity))
            share = todo[self.state.process_index :: self.state.num_processes]
            watch = progress if first else _nobody_watches
            with watch(label, self.dataset.label, len(share), len(self.dataset.rows) - len(todo)) as advance:
                for row in score_rows(read, share, batch_size=batch_size, workers=workers):
                    table.add(row)
                    advance(row)
            if not first:
                table.finish([row.path for row in share])
            peaks = [peak for peak in gather_object([memory.bytes()]) if peak is not None]
            if first:
                table.absorb(self._parts(), label, identity)
                self._finish(table)
                run = {
                    "batch_size": batch_size if metric.takes_batches else 1,
                    "processes": self.state.num_processes,
                    **machine_facts(memory.device),
                    "peak_memory_bytes": max(peaks, default=None),
                }
                run_facts = run if todo else self._earlier_run()
                self._write_facts({**asdict(metric.facts), "identity": identity, **run_facts})
        self.state.wait_for_everyone()

    def _parts(self) -> list[Path]:
        """Tables of the other processes, of this run or of one that was killed."""
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.stem)}.part-*"))

    def _unfinished(self, table: ScoreTable[BenchmarkRow]) -> list[OpinionRow]:
        """Rows without a score of today's image, or scored beside another reference."""
        unscored = set(table.unfinished(row.path for row in self.dataset.rows))
        with_reference = self.description.mode == "FR"
        return [
            row
            for row in self.dataset.rows
            if row.path in unscored or (with_reference and table.rows[file_key(row.path)].reference != row.reference)
        ]

    def _finish(self, table: ScoreTable[BenchmarkRow]) -> None:
        # The opinions are the dataset's of today; an image that is no longer in it keeps its score, without one.
        opinions = {file_key(row.path): row.mos for row in self.dataset.rows}
        for key, row in table.rows.items():
            table.rows[key] = replace(row, mos=opinions.get(key))
        table.finish([row.path for row in self.dataset.rows])

    def _earlier_run(self) -> dict[str, Any]:
        """`RUN_FACTS` of the run that scored, where this one had nothing to score."""
        path = self.path.with_suffix(".json")
        earlier = read_facts(path) if path.exists() else {}
        return {key: earlier.get(key) for key in RUN_FACTS}

    def _write_facts(self, found: dict[str, Any], problem: str | None = None) -> None:
        options = self.spec.options.items()
        facts = {
            "metric": self.spec.label,
            "name": self.spec.name,
            "options": {key: str(value) if isinstance(value, Path) else value for key, value in options},
            "mode": self.description.mode,
            "lower_better": self.description.lower_better,
            "dataset": self.dataset.label,
            "dataset_facts": self.dataset.facts,
            "notes": self.dataset.notes,
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **found,
            "problem": problem,
        }
        write_output(self.path.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")


def _open_table(path: Path, resume: bool, metric: str, identity: str) -> ScoreTable[BenchmarkRow]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    return ScoreTable(path, resume, not resume, BenchmarkRow).open(metric, identity)


def _check_labels(labelled: Sequence[tuple[str, str]], what: str) -> None:
    """Check (label, what it stands for) pairs."""
    seen = set()
    for label, source in labelled:
        if label in seen:
            raise InputError(f"two {what}s are called {label!r}: give one another name, NEWNAME={source}")
        if not label or label.startswith(".") or FORBIDDEN_IN_LABELS & set(label):
            raise InputError(f"{what} {label!r} cannot name a file: give another name, NEWNAME={source}")
        seen.add(label)
