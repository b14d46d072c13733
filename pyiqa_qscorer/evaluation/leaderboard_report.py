"""The leaderboard as tables for the terminal, and as files: pyiqa's CSV, Markdown, JSON, one HTML page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ..report import NONE, Cell, Picture, Section, Table, data_uri, html_page, markdown, number, png, size, write_output
from .bootstrap import LEVEL
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

    `thumbnails` embeds small copies of images; leave them out where the images must not be passed on. Raises
    `OutputError`: a file cannot be written; the old one then stays.
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
    """The table in the form of pyiqa's benchmark script: a row per metric, cells empty where there is no result."""
    columns = ["Metric name", *(f"{dataset}(PLCC/SRCC/KRCC)" for dataset in board.datasets)]
    rows = [(metric, *map(_pyiqa_cell, entries)) for metric, entries in _by_metric(board)]
    return pd.DataFrame(rows, columns=columns).to_csv(index=False, lineterminator="\n")


def _pyiqa_cell(entry: Entry | None) -> str:
    if entry is None or entry.agreement.srcc is None:
        return ""
    found = entry.agreement
    return "/".join(str(round(value, 4)) for value in (found.plcc, found.srcc, found.krcc) if value is not None)


def _by_metric(board: Leaderboard) -> list[tuple[str, list[Entry | None]]]:
    """Each metric with its entries on all datasets; None where it was not run."""
    entries = {(entry.metric, entry.dataset): entry for entry in board.entries}
    return [(metric, [entries.get((metric, dataset)) for dataset in board.datasets]) for metric in board.metrics]


def terminal_tables(board: Leaderboard) -> list[Table]:
    """A table per dataset, best first, that fits into 80 columns."""
    return [_table(dataset, board.ran(dataset), TERMINAL) for dataset in board.datasets]


def failures(entries: Sequence[Entry]) -> list[str]:
    """What went wrong, a sentence each; metrics that failed alike stand together."""
    found = []
    for entry in entries:
        reasons = [f"{count} failed: {reason}" for reason, count in entry.failures]
        if entry.facts["problem"]:
            reasons = [f"not run: {entry.facts['problem']}"]
        elif entry.agreement.problem is not None:
            reasons.append(f"no correlation: {entry.agreement.problem}")
        elif entry.agreement.fit_problem is not None:
            reasons.append(f"no curve: {entry.agreement.fit_problem}")
        found += [(reason, entry.metric) for reason in reasons]
    return [f"{', '.join(names)}: {reason}" for reason, names in _grouped(found).items()]


def _grouped(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """The second ones of all pairs that have the same first one."""
    found: dict[str, list[str]] = {}
    for first, second in pairs:
        found.setdefault(first, []).append(second)
    return found


# --- columns ----------------------------------------------------------------------------------------------------------


Columns = dict[str, Callable[[Entry], Cell]]
"""Columns of a table with a row per metric: heading -> cell of an entry."""


def _table(title: str, entries: Sequence[Entry], columns: Columns, words: int = 1) -> Table:
    return Table(title, list(columns), [[cell(entry) for cell in columns.values()] for entry in entries], words)


def _column(value: Callable[[Entry], Any], in_words: Callable[[Any], str] = number) -> Callable[[Entry], Cell]:
    """A column of numbers, shown in words; where there is none, the row is sorted last."""

    def cell(entry: Entry) -> Cell:
        found = value(entry)
        return Cell(in_words(found), "" if found is None else found)

    return cell


def _interval(entry: Entry) -> Cell:
    interval = entry.intervals["srcc"]
    return Cell(NONE, "") if interval is None else Cell(f"{interval[0]:.3f}, {interval[1]:.3f}", interval[0])


def _images(entry: Entry) -> Cell:
    count, of = entry.agreement.images, len(entry.rows)
    return Cell(f"{count} of {of}" if count < of else str(count), count)


def _seconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f}" if value >= 1 else f"{value:.2g}"


AGREEMENT: Columns = {
    "metric": lambda entry: Cell(entry.metric, strong=entry.not_worse_than_best),
    "kind": lambda entry: Cell(entry.facts["mode"]),
    "SRCC": _column(lambda entry: entry.agreement.srcc),
    "95 %": _interval,
    "PLCC": _column(lambda entry: entry.agreement.plcc),
    "PLCC fitted": _column(lambda entry: entry.agreement.plcc_fitted),
    "KRCC": _column(lambda entry: entry.agreement.krcc),
    "RMSE fitted": _column(lambda entry: entry.agreement.rmse_fitted),
    "images": _images,
}
COST: Columns = {
    "metric": lambda entry: Cell(entry.metric),
    "s/image": _column(lambda entry: entry.seconds, _seconds),
    "images/s": _column(lambda entry: entry.images_per_second, partial(number, digits=1)),
    "batch": _column(lambda entry: entry.facts["batch_size"], lambda value: str(value or NONE)),
    "memory": _column(lambda entry: entry.facts["peak_memory_bytes"], size),
    "parameters": _column(lambda entry: entry.facts["parameters"], "{:,}".format),
    "download": _column(lambda entry: entry.facts["download_bytes"], size),
}
TERMINAL: Columns = {
    **{name: AGREEMENT[name] for name in ("metric", "SRCC", "95 %", "PLCC")},
    "fitted": AGREEMENT["PLCC fitted"],
    "KRCC": AGREEMENT["KRCC"],
    "images": lambda entry: Cell(str(entry.agreement.images)),
    "s/image": COST["s/image"],
}


# --- sections ---------------------------------------------------------------------------------------------------------


def _overview(board: Leaderboard) -> Section:
    def cell(entry: Entry | None) -> Cell:
        return Cell(NONE, "") if entry is None else replace(AGREEMENT["SRCC"](entry), strong=entry.not_worse_than_best)

    rows = [[Cell(metric), *map(cell, entries)] for metric, entries in _by_metric(board)]
    return Section("", board.alarms, [LEGEND], [Table("", ("metric", *board.datasets), rows)])


def _section(board: Leaderboard, dataset: str, pictures: Sequence[Section] = ()) -> Section:
    entries, shown = board.of(dataset), board.ran(dataset)
    facts = entries[0].facts["dataset_facts"]
    opinions = "DMOS, lower is better" if facts["lower_better"] else "MOS, higher is better"
    notes = dict.fromkeys(note for entry in entries for note in entry.facts["notes"])
    parts = [Section("Cost", (), _machines(shown), [_table("", shown, COST)])] if shown else []
    if failed := failures(entries):
        parts.append(Section("What failed", items=failed))
    parts += [*_published(dataset), *pictures]
    if pairs := [pair for pair in board.pairs if pair.dataset == dataset]:
        rows = [
            (
                *(pair.first, pair.second),
                f"{pair.better} is better" if pair.better else "no difference beyond chance",
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
        alarms=[alarm] if (alarm := board.wrong_direction(dataset)) else [],
        paragraphs=[" ".join([f"{facts['images']} images; {opinions}.", *(f"{note}." for note in notes)])],
        tables=[_table("", shown, AGREEMENT, words=2)] if shown else [],
        parts=parts,
    )


def _machines(entries: Sequence[Entry]) -> list[str]:
    """Where times and memory were measured, a sentence per machine."""
    found = []
    for entry in entries:
        facts = entry.facts
        machine = f"{facts['device']}, processor {facts['processor']} "
        machine += f"(cores: {facts['cores']}, torch threads: {facts['threads']})"
        found.append((machine if facts["device"] else "an unknown machine", entry.metric))
    metrics = _grouped(found)
    return [
        f"Time and memory{' of ' + ', '.join(names) if len(metrics) > 1 else ''} measured on {machine}."
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
    shown = [entry for entry in board.ran(dataset) if entry.agreement.problem is None]
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
        drawn = [
            Picture(
                data_uri(png(scatter(entry))),
                f"Scores of {entry.metric} against the opinions on {dataset}",
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


# --- JSON -------------------------------------------------------------------------------------------------------------


def as_json(board: Leaderboard) -> dict[str, Any]:
    """Everything but the single images, as plain values; numbers that are not defined are null."""
    return {
        "bootstrap": {"resamples": board.resamples, "seed": board.seed, "level": LEVEL},
        "warnings": board.alarms,
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
