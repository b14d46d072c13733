"""Pictures of the leaderboard: scatter of scores against opinions, accuracy against cost, thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..images.thumbnails import address_from, thumbnail
from ..report import Picture, legend_below, log_ticks, new_axes
from .results import Entry

THUMBNAIL_SIDE = 200
DISAGREEMENTS = 3
BLUE, RED = "#2563a8", "#c2410c"


def scatter(entry: Entry) -> Figure:
    """Score against opinion of every image, up and right is better, with the fitted curve."""
    figure, (axes,) = new_axes(size=(4.6, 3.5))
    rows = entry.scored
    scores = np.array([row.score for row in rows], np.float64)
    mos = np.array([row.mos for row in rows], np.float64)
    size = float(np.clip(600 / max(len(rows), 1), 3, 22))
    axes.scatter(scores, mos, s=size, color=BLUE, alpha=0.75 if len(rows) < 300 else 0.35, linewidths=0)
    fit = entry.agreement.fit
    if fit is not None:
        oriented, _ = entry.oriented(rows)
        line = np.linspace(oriented.min(), oriented.max(), 200)
        axes.plot(entry.signs[0] * line, entry.signs[1] * fit(line), color=RED, linewidth=1.8)
    if entry.facts["lower_better"]:
        axes.invert_xaxis()
    if entry.dmos:
        axes.invert_yaxis()
    direction = " (lower is better)" if entry.facts["lower_better"] else ""
    axes.set(xlabel=f"{entry.metric}{direction}", ylabel="DMOS (lower is better)" if entry.dmos else "MOS")
    return figure


def accuracy_against_cost(entries: Sequence[Entry]) -> Figure | None:
    """SRCC against median seconds per image, named dots; None without two points."""
    points = [
        (1000 * entry.seconds, entry.agreement.srcc, entry)
        for entry in entries
        if entry.seconds and entry.agreement.srcc is not None
    ]
    if len(points) < 2:
        return None
    figure, (axes,) = new_axes(size=(5.4, 4.0))
    for mode, color, label in (("NR", BLUE, "no reference"), ("FR", RED, "full reference")):
        of_mode = [point for point in points if point[2].facts["mode"] == mode]
        if not of_mode:
            continue
        x, y, _ = zip(*of_mode, strict=True)
        ranges = np.array([entry.intervals["srcc"] or (srcc, srcc) for _, srcc, entry in of_mode])
        bars = np.maximum(0, [y - ranges[:, 0], ranges[:, 1] - y])
        axes.errorbar(x, y, yerr=bars, fmt="o", color=color, ecolor=color, elinewidth=1, alpha=0.85, label=label)
    axes.set(xlabel="milliseconds per image (median)", ylabel="SRCC (bars: 95 % interval)", xscale="log")
    log_ticks(axes.xaxis)
    axes.margins(x=0.3, y=0.08)
    if len({entry.facts["mode"] for *_, entry in points}) > 1:
        legend_below(figure, axes)
    low, high = axes.get_ylim()
    free = -np.inf
    for cost, srcc, entry in sorted(points, key=lambda point: point[1]):  # names that would touch are moved apart
        free = max(free + 0.055 * (high - low), srcc)
        text = axes.annotate(entry.metric, (cost, srcc), (cost * 1.1, free), fontsize=9, va="center")
        text.set_in_layout(False)  # a long name must not squeeze the axes away
    return figure


def worst_disagreements(entry: Entry, page: Path, thumbnails: bool = True) -> dict[str, list[Picture]]:
    """The images that the metric overrates most, and those that it underrates most, by its fitted curve.

    Each thumbnail, or its caption alone, leads from `page`, the folder of the page, to its image.
    """
    rows = entry.scored
    scores, mos = entry.oriented(rows)
    fit = entry.agreement.fit
    predicted = fit(scores) if fit is not None else np.polyval(np.polyfit(scores, mos, 1), scores)
    order = np.argsort(predicted - mos, kind="stable")
    count = min(DISAGREEMENTS, len(rows) // 2)
    sign = entry.signs[1]

    def picture(index: int) -> Picture:
        name = rows[index].path.replace("\\", "/").rsplit("/", 1)[-1]
        caption = f"{name}: people {sign * mos[index]:.3g}, metric {sign * predicted[index]:.3g}"
        uri = thumbnail(rows[index].path, THUMBNAIL_SIDE) if thumbnails else None
        return Picture(uri, name, caption, address_from(page, rows[index].path))

    return {
        "Rated too high": [picture(index) for index in reversed(order[len(order) - count :].tolist())],
        "Rated too low": [picture(index) for index in order[:count].tolist()],
    }
