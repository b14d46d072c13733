"""Semantic confusion as tables, one picture, JSON and one HTML page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..report import (
    Cell,
    Picture,
    Section,
    Table,
    data_uri,
    html_page,
    legend_below,
    new_axes,
    number,
    png,
    write_output,
)
from .confusion import KINDS, Confusion, Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND_NAMES = {"neutral": "neutral text", "other_sense": "level words in another sense", "prompts": "other prompts"}
LEAD = (
    "How far tuning for image quality moved a model's language away from its base, on texts that have nothing to do "
    "with it, and how far the quality of a picture leaks into answers that should not depend on it."
)


def tables(found: Sequence[Confusion]) -> list[Table]:
    """The tables for the terminal; numbers in brackets are 95 % intervals over texts, reviews or pictures."""
    drifts = (f"KL, {KIND_NAMES[kind]}" for kind in KINDS)
    language = Table(
        "Language",
        ("model", *drifts, "score tokens' probability", "level words', base", "level words'"),
        [
            (
                one.name,
                *_cells(*(one.drift[kind] for kind in KINDS)),
                *_cells(one.score_token_mass, one.base_level_word_mass, one.level_word_mass),
            )
            for one in found
        ],
    )
    before = found[0].base_sentiment
    answered: list[Sequence[Cell | str]] = [("base", *_cells(before.accuracy, before.calibrated, before.order), "", "")]
    for one in found:
        told = one.sentiment
        changes = one.accuracy_change, one.order_change
        answered.append((one.name, *_cells(told.accuracy, told.calibrated, told.order, *changes)))
    columns = ("model", "accuracy", "calibrated", "SRCC", "calibrated - base's", "SRCC - base's")
    reviews = Table("100 reviews, answered with level words (chance 0.2)", columns, answered)
    words = Table(
        "Level words: change of log-probability, median rank, neighbours",
        ("model", "word", "where a text has it", "elsewhere", "base's rank", "rank", "neighbours kept"),
        [
            (
                *(one.name, word.word),
                *_cells(word.where_right, word.elsewhere),
                *(f"{word.base_rank:g}", f"{word.rank:g}", f"{word.neighbours_kept:.0%}"),
            )
            for one in found
            for word in one.words
        ],
        words=2,
    )
    leaks = Table(
        "Unrelated questions: SRCC of the answer's level and the picture's quality",
        ("model", "question", "base", "tuned"),
        [(one.name, leak.question, *_cells(leak.base, leak.tuned)) for one in found for leak in one.leaks],
        words=2,
    )
    return [language, reviews, words, *([leaks] if leaks.rows else [])]


def _cells(*estimates: Estimate | None) -> list[Cell]:
    cells = []
    for one in estimates:
        ends = "" if one is None or one.low is None else f" [{number(one.low)}, {number(one.high)}]"
        cells.append(Cell(number(None), "") if one is None else Cell(number(one.value) + ends, one.value))
    return cells


def conclusions(found: Sequence[Confusion]) -> list[str]:
    """What a reader can take home, a sentence each."""
    sentences = []
    for one in found:
        change, drift = one.accuracy_change, one.drift["neutral"].value
        sure = change.low is not None and change.high is not None and (change.low > 0 or change.high < 0)
        sentence = (
            f"{one.name}: {number(drift)} nats from its base on neutral text; calibrated accuracy on reviews "
            f"{change.value:+.3f}{'' if sure else ' (within chance)'}"
        )
        if one.leaks:
            before, after = (
                float(np.mean([abs(getattr(leak, name).value) for leak in one.leaks])) for name in ("base", "tuned")
            )
            sentence += f"; mean |SRCC| of unrelated answers and picture quality {after:.3f}, in the base {before:.3f}"
        sentences.append(f"{sentence}.")
    return sentences


def figure(found: Sequence[Confusion]) -> Figure:
    """Drift by kind of text, what changed in reviews, and leakage, one bar a model."""
    made, axes = new_axes(3 if found[0].leaks else 2, (5.2, 7.5 if found[0].leaks else 5.2))
    groups: list[tuple[str, list[str], list[list[Estimate]]]] = [
        ("KL from the base, nats", [KIND_NAMES[kind] for kind in KINDS], [[m.drift[k] for k in KINDS] for m in found]),
        (
            "reviews: change against the base",
            ["calibrated accuracy", "SRCC"],
            [[model.accuracy_change, model.order_change] for model in found],
        ),
        (
            "leak: SRCC with picture quality",
            [f"question {place}" for place in range(1, len(found[0].leaks) + 1)],
            [[leak.tuned for leak in model.leaks] for model in found],
        ),
    ]
    for axis, (label, names, bars) in zip(axes, groups, strict=False):
        width = 0.8 / len(found)
        for index, (model, estimates) in enumerate(zip(found, bars, strict=True)):
            places = np.arange(len(names)) + (index - (len(found) - 1) / 2) * width
            values = np.array([one.value for one in estimates])
            ends = np.array([(one.low, one.high) for one in estimates], np.float64).T  # NaN: no line is drawn
            errors = np.abs(ends - values)
            axis.bar(places, values, width, yerr=errors, capsize=2, label=model.name, error_kw={"linewidth": 0.8})
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_ylabel(label, fontsize=9)
    legend_below(made, axes[0], 1)
    return made


def write_report(folder: Path, found: Sequence[Confusion], base: str) -> Path:
    """Write confusion.json (everything), confusion.png and confusion.html; each appears whole or not at all.

    Returns the path of the page. Raises `OutputError`: the folder cannot be written.
    """
    drawn = png(figure(found))
    caption = "Bars: means; lines: 95 % intervals over texts, reviews or pictures."
    sections = [
        Section("What follows", items=conclusions(found)),
        Section("Picture", pictures=[Picture(data_uri(drawn), "drift, reviews and leakage by model", caption)]),
        Section("Tables", tables=tables(found)),
    ]
    numbers = {"base": base, "models": [dataclasses.asdict(one) for one in found]}
    content: dict[str, str | bytes] = {
        "confusion.json": json.dumps(numbers, indent=1) + "\n",
        "confusion.png": drawn,
        "confusion.html": html_page("Semantic confusion", [LEAD, f"Base: {base}."], sections),
    }
    for name, data in content.items():
        write_output(folder / name, data)
    return folder / "confusion.html"
