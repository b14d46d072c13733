"""The report as one self-contained HTML page: no file, font or script from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .number_format import NONE, bytes_words, number, seconds_words
from .plots import accuracy_against_cost, scatter, worst_disagreements
from .published import SOURCE, published_results
from .results import Entry, Leaderboard, machine_sentences


def html_page(board: Leaderboard, thumbnails: bool = True) -> str:
    """The page.

    Args:
        thumbnails: embed small copies of the images that metric and people disagree on most. Leave them out where
            the images must not be passed on.
    """
    environment = Environment(
        loader=PackageLoader("pyiqa_qscorer.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        made=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC"),
        board=board,
        overview=_overview(board),
        sections=[_section(board, dataset, thumbnails) for dataset in board.datasets],
        source=SOURCE,
    )


def _overview(board: Leaderboard) -> list[dict[str, Any]]:
    """SRCC of every metric on every dataset."""
    entries = {(entry.metric, entry.dataset): entry for entry in board.entries}
    rows = []
    for metric in board.metrics:
        cells = []
        for dataset in board.datasets:
            entry = entries.get((metric, dataset))
            srcc = None if entry is None else entry.agreement.srcc
            best = entry is not None and entry.not_worse_than_best
            cells.append({"text": number(srcc), "value": _sort_value(srcc), "best": best})
        rows.append({"metric": metric, "cells": cells})
    return rows


def _section(board: Leaderboard, dataset: str, thumbnails: bool) -> dict[str, Any]:
    entries = board.of(dataset)
    shown = [entry for entry in entries if entry.rows]
    facts = entries[0].facts["dataset_facts"]
    return {
        "name": dataset,
        "images": facts["images"],
        "opinions": "DMOS, lower is better" if facts["lower_better"] else "MOS, higher is better",
        "notes": list(dict.fromkeys(note for entry in entries for note in entry.facts["notes"])),
        "columns": _COLUMNS,
        "rows": [_row(entry) for entry in shown],
        "machines": machine_sentences(entries),
        "published": [_published_row(result) for result in published_results() if result.dataset == dataset],
        "not_run": [(entry.metric, entry.facts["problem"]) for entry in entries if not entry.rows and entry.problem],
        "failures": _failures(shown),
        "undefined": [
            (entry.metric, entry.agreement.problem or entry.agreement.fit_problem)
            for entry in shown
            if entry.agreement.problem or entry.agreement.fit_problem
        ],
        "cost_plot": accuracy_against_cost(shown),
        "metrics": [
            {"name": entry.metric, "scatter": scatter(entry), "disagreements": worst_disagreements(entry, thumbnails)}
            for entry in shown
            if entry.agreement.problem is None
        ],
        "comparisons": [
            {
                "first": pair.first,
                "second": pair.second,
                "images": pair.images,
                "difference": f"{pair.difference:+.3f}",
                "p": f"{pair.adjusted:.3f}" if pair.adjusted >= 0.001 else "< 0.001",
                "value": pair.adjusted,
                "verdict": f"{pair.better} is better" if pair.better else "no difference beyond chance",
            }
            for pair in board.pairs
            if pair.dataset == dataset
        ],
    }


def _failures(entries: Sequence[Entry]) -> list[tuple[list[str], int, str]]:
    """Metrics, number of images, reason; metrics that failed alike stand together."""
    metrics: dict[tuple[int, str], list[str]] = {}
    for entry in entries:
        for reason, count in entry.failures:
            metrics.setdefault((count, reason), []).append(entry.metric)
    return [(names, count, reason) for (count, reason), names in metrics.items()]


_COLUMNS = (
    "metric",
    "kind",
    "SRCC",
    "95 %",
    "PLCC",
    "PLCC fitted",
    "KRCC",
    "RMSE fitted",
    "images",
    "failed",
    "s / image",
    "images / s",
    "batch",
    "memory",
    "parameters",
    "download",
)


def _row(entry: Entry) -> dict[str, Any]:
    found, facts = entry.agreement, entry.facts
    interval = entry.intervals.get("srcc")
    failed = len(entry.rows) - found.images
    speed, memory = entry.images_per_second, facts.get("peak_memory_bytes")
    return {
        "best": entry.not_worse_than_best,
        "better_than": entry.better_than,
        "cells": [
            (entry.metric, entry.metric),
            (facts["mode"], facts["mode"]),
            *[(number(found.srcc), _sort_value(found.srcc))],
            (f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else NONE, _sort_value(interval and interval[0])),
            *[
                (number(value), _sort_value(value))
                for value in (found.plcc, found.plcc_fitted, found.krcc, found.rmse_fitted)
            ],
            (str(found.images), found.images),
            (str(failed), failed),
            (seconds_words(entry.seconds), _sort_value(entry.seconds)),
            (number(speed, 1), _sort_value(speed)),
            (str(facts["batch_size"] or NONE), _sort_value(facts["batch_size"])),
            (bytes_words(memory), _sort_value(memory)),
            (f"{facts['parameters']:,}", facts["parameters"]),
            (bytes_words(facts.get("download_bytes")), _sort_value(facts.get("download_bytes"))),
        ],
    }


def _published_row(result: Any) -> Sequence[tuple[str, Any]]:
    measured = {"metric": result.method, "kind": f"NR, {result.setting}"}
    values = {"SRCC": result.srcc, "PLCC fitted": result.plcc}
    return [
        (number(values[column]), values[column])
        if column in values
        else (measured.get(column, NONE), measured.get(column, ""))
        for column in _COLUMNS
    ]


def _sort_value(value: float | None) -> float | str:
    """What a cell is sorted by; empty: last in either order."""
    return "" if value is None else value
