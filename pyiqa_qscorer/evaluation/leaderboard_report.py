"""The leaderboard as files: pyiqa's CSV, Markdown, JSON; the HTML page is in `page`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .benchmark_files import write_text
from .number_format import NONE, bytes_words, number, number_with_interval, seconds_words
from .page import html_page
from .published import SOURCE, PublishedResult, published_results
from .results import Entry, Leaderboard, machine_sentences


def write_reports(board: Leaderboard, output: Path, thumbnails: bool = True) -> list[Path]:
    """Write `leaderboard.csv`, `.md`, `.json` and `report.html` into the output folder.

    Raises:
        OutputError: a file cannot be written; the old one then stays.
    """
    texts = {
        "leaderboard.csv": pyiqa_csv(board),
        "leaderboard.md": markdown(board),
        "leaderboard.json": json.dumps(as_json(board), indent=2) + "\n",
        "report.html": html_page(board, thumbnails),
    }
    for name, text in texts.items():
        write_text(output / name, text)
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


def published_beside(board: Leaderboard, dataset: str) -> list[PublishedResult]:
    """Published figures of a dataset of the leaderboard."""
    return [result for result in published_results() if result.dataset == dataset]


def markdown(board: Leaderboard) -> str:
    """One table per dataset, best SRCC first, then what failed and what was published."""
    lines = ["# Leaderboard", "", *_legend(board), ""]
    for dataset in board.datasets:
        entries = board.of(dataset)
        facts = entries[0].facts["dataset_facts"]
        lines += [f"## {dataset}", "", f"{facts['images']} images. {' '.join(_notes(entries))}".strip(), ""]
        lines.append(
            "| metric | kind | SRCC | PLCC | PLCC fitted | KRCC | RMSE fitted | images | s/image | images/s | batch "
            "| memory | parameters | download |"
        )
        lines.append("| --- | --- | " + " | ".join(["---:"] * 12) + " |")
        lines += [_markdown_row(entry) for entry in entries if entry.rows]
        lines += ["", *machine_sentences(entries), ""]
        lines += [f"- {text}" for entry in entries for text in failure_words(entry)]
        published = published_beside(board, dataset)
        if published:
            lines += ["", f"Published, not run here ({SOURCE}):", "", "| method | setting | SRCC | PLCC fitted |"]
            lines.append("| --- | --- | ---: | ---: |")
            lines += [f"| {r.method} | {r.setting} | {r.srcc:.3f} | {r.plcc:.3f} |" for r in published]
        lines.append("")
    return "\n".join(lines)


def _legend(board: Leaderboard) -> list[str]:
    return [
        f"Higher is better for every correlation. Brackets: 95 % bootstrap interval ({board.resamples} draws of the "
        "images). Bold: no metric is better beyond chance (paired bootstrap of SRCC on the same images, Holm-adjusted "
        "p < 0.05). PLCC: of the raw scores, as pyiqa's benchmark; fitted: after the 4-parameter logistic curve, as "
        "the published evaluation."
    ]


def _notes(entries: Sequence[Entry]) -> list[str]:
    return [f"{note}." for note in dict.fromkeys(note for entry in entries for note in entry.facts["notes"])]


def _markdown_row(entry: Entry) -> str:
    found, facts = entry.agreement, entry.facts
    name = f"**{entry.metric}**" if entry.not_worse_than_best else entry.metric
    cells = [
        name,
        facts["mode"],
        number_with_interval(found.srcc, entry.intervals.get("srcc")),
        number_with_interval(found.plcc, entry.intervals.get("plcc")),
        number(found.plcc_fitted),
        number(found.krcc),
        number(found.rmse_fitted),
        f"{found.images} of {len(entry.rows)}" if found.images < len(entry.rows) else str(found.images),
        seconds_words(entry.seconds),
        number(entry.images_per_second, 1),
        str(facts["batch_size"] or NONE),
        bytes_words(facts.get("peak_memory_bytes")),
        f"{facts['parameters']:,}",
        bytes_words(facts.get("download_bytes")),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def failure_words(entry: Entry) -> list[str]:
    """What went wrong with an entry, a sentence each."""
    if entry.facts.get("problem"):
        return [f"{entry.metric}: not run: {entry.facts['problem']}"]
    words = [f"{entry.metric}: {count} failed: {reason}" for reason, count in entry.failures]
    for problem in dict.fromkeys((entry.agreement.problem, entry.agreement.fit_problem)):
        if problem is not None:
            words.append(f"{entry.metric}: {'no correlation' if entry.agreement.problem else 'no curve'}: {problem}")
    return words


def as_json(board: Leaderboard) -> dict[str, Any]:
    """Everything but the single images, as plain values; numbers that are not defined are null."""
    return {
        "bootstrap": {"resamples": board.resamples, "seed": board.seed, "level": 0.95},
        "entries": [_json_entry(entry) for entry in board.entries],
        "comparisons": [asdict(pair) | {"better": pair.better} for pair in board.pairs],
        "published": {
            "source": SOURCE,
            "results": [asdict(r) for dataset in board.datasets for r in published_beside(board, dataset)],
        },
    }


def _json_entry(entry: Entry) -> dict[str, Any]:
    agreement = asdict(entry.agreement)
    return entry.facts | {
        "problem": entry.problem,
        "images": len(entry.rows),
        "scored": len(entry.scored),
        "failures": [{"reason": reason, "images": count} for reason, count in entry.failures],
        "agreement": agreement,
        "intervals": entry.intervals,
        "seconds_per_image": entry.seconds,
        "images_per_second": entry.images_per_second,
        "better_than": entry.better_than,
        "not_worse_than_best": entry.not_worse_than_best,
    }
