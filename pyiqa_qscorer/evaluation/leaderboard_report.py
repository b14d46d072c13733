"""The leaderboard as tables for the terminal, and as files: pyiqa's CSV, Markdown, JSON, one HTML page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..report import (
    NONE,
    Cell,
    Picture,
    Section,
    Table,
    data_uri,
    html_page,
    markdown,
    number,
    png,
    size,
    write_output,
)
from .plots import accuracy_against_cost, scatter, worst_disagreements
from .published import SOURCE, published_results
from .results import Entry, Leaderboard

TITLE = "Image quality metrics against human opinions"
LEGEND = (
    "SRCC of each metric on each dataset; 1 is perfect agreement with people. Bold: no other metric is better there "
    "beyond chance."
)


def write_reports(board: Leaderboard, output: Path, thumbnails: bool = True) -> list[Path]:
    """Write `leaderboard.csv`, `.md`, `.json` and `report.html` into the output folder.

    Args:
        thumbnails: embed small copies of the images that metric and people disagree on most. Leave them out where
            the images must not be passed on.

    Raises:
        OutputError: a file cannot be written; the old one then stays.
    """
    plain = [_overview(board), *(_section(board, dataset) for dataset in board.datasets), _method(board)]
    drawn = [_section(board, dataset, _pictures(board, dataset, output, thumbnails)) for dataset in board.datasets]
    texts = {
        "leaderboard.csv": pyiqa_csv(board),
        "leaderboard.md": markdown(TITLE, plain),
        "leaderboard.json": json.dumps(as_json(board), indent=2) + "\n",
        "report.html": html_page(TITLE, [], [plain[0], *drawn, plain[-1]]),
    }
    for name, text in texts.items():
        write_output(output / name, text)
    return [output / name for name in texts]


def pyiqa_csv(board: Leaderboard) -> str:
    """The table in the form of pyiqa's benchmark script: a row per metric, `PLCC/SRCC/KRCC` cells, raw PLCC.

    A cell is empty where there is no result.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Metric name", *(f"{dataset}(PLCC/SRCC/KRCC)" for dataset in board.datasets)])
    cells = {(entry.metric, entry.dataset): _pyiqa_cell(entry) for entry in board.entries}
    for metric in board.metrics:
        writer.writerow([metric, *(cells.get((metric, dataset), "") for dataset in board.datasets)])
    return text.getvalue()


def _pyiqa_cell(entry: Entry) -> str:
    found = entry.agreement
    if found.plcc is None or found.srcc is None or found.krcc is None:
        return ""
    return f"{round(found.plcc, 4)}/{round(found.srcc, 4)}/{round(found.krcc, 4)}"


def terminal_tables(board: Leaderboard) -> list[Table]:
    """A table per dataset, best first, that fits into 80 columns."""
    columns = ("metric", "SRCC", "95 %", "PLCC", "fitted", "KRCC", "images", "s/image")
    return [
        Table(
            dataset,
            columns,
            [
                (
                    Cell(entry.metric, strong=entry.not_worse_than_best),
                    *_agreement(entry)[:5],
                    str(entry.agreement.images),
                    _seconds(entry.seconds),
                )
                for entry in board.of(dataset)
                if entry.rows
            ],
        )
        for dataset in board.datasets
    ]


def failures(entries: Sequence[Entry]) -> list[str]:
    """What went wrong, a sentence each; metrics that failed alike stand together."""
    metrics: dict[str, list[str]] = {}
    for entry in entries:
        reasons = [f"{count} failed: {reason}" for reason, count in entry.failures]
        if entry.facts.get("problem"):
            reasons = [f"not run: {entry.facts['problem']}"]
        elif entry.agreement.problem is not None:
            reasons.append(f"no correlation: {entry.agreement.problem}")
        elif entry.agreement.fit_problem is not None:
            reasons.append(f"no curve: {entry.agreement.fit_problem}")
        for reason in reasons:
            metrics.setdefault(reason, []).append(entry.metric)
    return [f"{', '.join(names)}: {reason}" for reason, names in metrics.items()]


# --- sections ---------------------------------------------------------------------------------------------------------


def _overview(board: Leaderboard) -> Section:
    entries = {(entry.metric, entry.dataset): entry for entry in board.entries}
    rows = []
    for metric in board.metrics:
        cells = [Cell(metric)]
        for dataset in board.datasets:
            entry = entries.get((metric, dataset))
            srcc = None if entry is None else entry.agreement.srcc
            cells.append(_cell(srcc, number(srcc), entry is not None and entry.not_worse_than_best))
        rows.append(cells)
    alarms = [text for dataset in board.datasets if (text := board.wrong_direction(dataset))]
    return Section("", alarms, [LEGEND], [Table("", ("metric", *board.datasets), rows)])


def _section(board: Leaderboard, dataset: str, pictures: Sequence[Section] = ()) -> Section:
    entries = board.of(dataset)
    shown = [entry for entry in entries if entry.rows]
    facts = entries[0].facts["dataset_facts"]
    opinions = "DMOS, lower is better" if facts["lower_better"] else "MOS, higher is better"
    notes = dict.fromkeys(note for entry in entries for note in entry.facts["notes"])
    alarm = board.wrong_direction(dataset)
    parts = [
        Section("Cost", (), _machines(shown), [_cost_table(shown)]),
        *([Section("What failed", items=failed)] if (failed := failures(entries)) else []),
        *_published(dataset),
        *pictures,
    ]
    pairs = [pair for pair in board.pairs if pair.dataset == dataset]
    if pairs:
        rows = [
            (
                *(
                    pair.first,
                    pair.second,
                    f"{pair.better} is better" if pair.better else "no difference beyond chance",
                ),
                f"{pair.difference:+.3f}",
                Cell(f"{pair.adjusted:.3f}" if pair.adjusted >= 0.001 else "< 0.001", pair.adjusted),
                str(pair.images),
            )
            for pair in pairs
        ]
        columns = ("first", "second", "verdict", "SRCC difference", "adjusted p", "images")
        title = f"Which differences are beyond chance ({len(pairs)} pairs)"
        parts.append(Section(title, tables=[Table("", columns, rows, words=3)], folded=True))
    return Section(
        dataset,
        alarms=[alarm] if alarm else [],
        paragraphs=[" ".join([f"{facts['images']} images; {opinions}.", *(f"{note}." for note in notes)])],
        tables=[_agreement_table(shown)] if shown else [],
        parts=parts if shown else parts[1:],
    )


def _agreement_table(entries: Sequence[Entry]) -> Table:
    columns = ("metric", "kind", "SRCC", "95 %", "PLCC", "PLCC fitted", "KRCC", "RMSE fitted", "images")
    rows = []
    for entry in entries:
        count, of = entry.agreement.images, len(entry.rows)
        rows.append(
            (
                Cell(entry.metric, strong=entry.not_worse_than_best),
                entry.facts["mode"],
                *_agreement(entry),
                Cell(f"{count} of {of}" if count < of else str(count), count),
            )
        )
    return Table("", columns, rows, words=2)


def _agreement(entry: Entry) -> list[Cell]:
    """SRCC, its interval, PLCC, PLCC fitted, KRCC, RMSE fitted."""
    found, interval = entry.agreement, entry.intervals.get("srcc")
    cells = [
        _cell(value, number(value))
        for value in (found.srcc, found.plcc, found.plcc_fitted, found.krcc, found.rmse_fitted)
    ]
    between = f"{interval[0]:.3f}, {interval[1]:.3f}" if interval else NONE
    return [cells[0], _cell(interval and interval[0], between), *cells[1:]]


def _cost_table(entries: Sequence[Entry]) -> Table:
    columns = ("metric", "s/image", "images/s", "batch", "memory", "parameters", "download")
    rows = []
    for entry in entries:
        facts, speed = entry.facts, entry.images_per_second
        memory, download = facts.get("peak_memory_bytes"), facts.get("download_bytes")
        rows.append(
            (
                entry.metric,
                _cell(entry.seconds, _seconds(entry.seconds)),
                _cell(speed, number(speed, 1)),
                str(facts["batch_size"] or NONE),
                _cell(memory, size(memory)),
                Cell(f"{facts['parameters']:,}", facts["parameters"]),
                _cell(download, size(download)),
            )
        )
    return Table("", columns, rows)


def _machines(entries: Sequence[Entry]) -> list[str]:
    """Where times and memory were measured, a sentence per machine."""
    metrics: dict[str, list[str]] = {}
    for entry in entries:
        facts = entry.facts
        words = f"{facts.get('device') or 'an unknown device'}, processor {facts['processor'] or 'unknown'}"
        if facts["processor"] is not None:
            words += f" (cores: {facts['cores']}, torch threads: {facts['threads']})"
        metrics.setdefault(words, []).append(entry.metric)
    of = len(metrics) > 1
    return [
        f"Time and memory{' of ' + ', '.join(names) if of else ''} measured on {machine}."
        for machine, names in metrics.items()
    ]


def _published(dataset: str) -> list[Section]:
    rows = [
        (result.method, result.setting, number(result.srcc), number(result.plcc))
        for result in published_results()
        if result.dataset == dataset
    ]
    table = Table("", ("method", "setting", "SRCC", "PLCC fitted"), rows, words=2)
    return [Section("Published, not run here", paragraphs=[f"Source: {SOURCE}."], tables=[table])] if rows else []


def _pictures(board: Leaderboard, dataset: str, output: Path, thumbnails: bool) -> list[Section]:
    shown = [entry for entry in board.of(dataset) if entry.agreement.problem is None and entry.rows]
    found = []
    cost = accuracy_against_cost(shown)
    if cost is not None:
        alt = f"SRCC of each metric on {dataset} against milliseconds per image"
        found.append(Section("Accuracy against cost", pictures=[Picture(data_uri(png(cost)), alt)]))
    if shown:
        text = (
            "Up and to the right is better. The line is the fitted logistic curve; below each plot stand the images "
            "that metric and people disagree on most, with the opinion of people and that of the metric, which is the "
            "curve's value for its score, both on the scale of the dataset."
        )
        alt = f"against the opinions on {dataset}"
        drawn = [
            Picture(
                data_uri(png(scatter(entry))),
                f"Scores of {entry.metric} {alt}",
                entry.metric,
                groups=worst_disagreements(entry, output, thumbnails),
            )
            for entry in shown
        ]
        title = "Score against opinion, and where they disagree most"
        found.append(Section(title, paragraphs=[text], pictures=drawn))
    return found


def _method(board: Leaderboard) -> Section:
    items = [
        "Correlations are turned so that higher is better, also for metrics and opinions where lower is better. They "
        "stand on the images that have a score; NaN counts as a failure.",
        "PLCC is of the raw scores, as in pyiqa's benchmark; fitted: after the 4-parameter logistic curve, as in the "
        "published evaluation. RMSE is between that curve and the opinions, on the dataset's scale.",
        f"95 %: percentile interval of {board.resamples} bootstrap draws of the images (seed {board.seed}).",
        "Better beyond chance: paired bootstrap of the SRCC difference on the images that both metrics scored (Efron "
        "and Tibshirani 1993), p adjusted for all pairs of the dataset (Holm 1979), below 0.05.",
        "Seconds per image: median, without reading the file; with batches an image's share of its batch. Images per "
        "second: of the metric alone. Memory: peak while the dataset was scored, above what the process held before "
        "the metric was built; a dash: not measured or not known.",
    ]
    return Section("How it was computed", items=items)


def _cell(value: float | None, text: str, strong: bool = False) -> Cell:
    """A number in words; where there is none, it is sorted last."""
    return Cell(text, "" if value is None else value, strong)


def _seconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}" if value >= 1 else f"{value:.2g}"


# --- JSON -------------------------------------------------------------------------------------------------------------


def as_json(board: Leaderboard) -> dict[str, Any]:
    """Everything but the single images, as plain values; numbers that are not defined are null."""
    return {
        "bootstrap": {"resamples": board.resamples, "seed": board.seed, "level": 0.95},
        "warnings": [text for dataset in board.datasets if (text := board.wrong_direction(dataset))],
        "entries": [_json_entry(entry) for entry in board.entries],
        "comparisons": [asdict(pair) | {"better": pair.better} for pair in board.pairs],
        "published": {
            "source": SOURCE,
            "results": [asdict(result) for result in published_results() if result.dataset in board.datasets],
        },
    }


def _json_entry(entry: Entry) -> dict[str, Any]:
    return entry.facts | {
        "problem": entry.problem,
        "images": len(entry.rows),
        "scored": len(entry.scored),
        "failures": [{"reason": reason, "images": count} for reason, count in entry.failures],
        "agreement": asdict(entry.agreement),
        "intervals": entry.intervals,
        "seconds_per_image": entry.seconds,
        "images_per_second": entry.images_per_second,
        "better_than": entry.better_than,
        "not_worse_than_best": entry.not_worse_than_best,
    }
