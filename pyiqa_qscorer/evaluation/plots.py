"""Pictures of the report, as data URIs: scatter of scores against opinions, accuracy against cost, thumbnails."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from ..errors import ImageError
from ..images.reading import open_image
from .results import Entry
from .scoring import BenchmarkRow

THUMBNAIL_SIDE = 200
DISAGREEMENTS = 3
BLUE, RED, GREY = "#2563a8", "#c2410c", "#6b7280"


@dataclass(frozen=True)
class Disagreement:
    """An image that metric and people see differently.

    Attributes:
        thumbnail: Data URI; None where the image could not be read any more, or none was wanted.
        mos: What people said, on the dataset's scale.
        predicted: What the metric's score stands for, on that scale.
        too_high: The metric thinks better of the image than people do.
    """

    name: str
    thumbnail: str | None
    mos: float
    predicted: float
    score: float
    too_high: bool


def scatter(entry: Entry) -> str:
    """Score against opinion of every image, up and right is better, with the fitted curve. PNG data URI."""
    figure = Figure(figsize=(4.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    rows = entry.scored
    scores, mos = [row.score for row in rows], [row.mos for row in rows]
    size = float(np.clip(600 / max(len(rows), 1), 3, 22))
    axes.scatter(scores, mos, s=size, color=BLUE, alpha=0.75 if len(rows) < 300 else 0.35, linewidths=0)  # type: ignore[arg-type]
    fit = entry.agreement.fit
    if fit is not None:
        oriented, _ = entry.oriented(rows)
        line = np.linspace(oriented.min(), oriented.max(), 200)
        signs = [-1 if entry.facts["lower_better"] else 1, -1 if _dmos(entry) else 1]
        axes.plot(signs[0] * line, signs[1] * fit(line), color=RED, linewidth=1.8)
    if entry.facts["lower_better"]:
        axes.invert_xaxis()
    if _dmos(entry):
        axes.invert_yaxis()
    axes.set_xlabel(f"{entry.metric}{' (lower is better)' if entry.facts['lower_better'] else ''}")
    axes.set_ylabel("DMOS (lower is better)" if _dmos(entry) else "MOS")
    _tidy(axes)
    return _png(figure)


def accuracy_against_cost(entries: Sequence[Entry]) -> str | None:
    """SRCC against median seconds per image, named dots. PNG data URI; None without two points."""
    points = [(e.seconds, e.agreement.srcc, e) for e in entries if e.seconds and e.agreement.srcc is not None]
    if len(points) < 2:
        return None
    figure = Figure(figsize=(5.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for mode, color in (("NR", BLUE), ("FR", RED)):
        of_mode = [(seconds, srcc, entry) for seconds, srcc, entry in points if entry.facts["mode"] == mode]
        if not of_mode:
            continue
        x, y = [1000 * seconds for seconds, _, _ in of_mode], [srcc for _, srcc, _ in of_mode]
        ranges = [entry.intervals.get("srcc") or (srcc, srcc) for _, srcc, entry in of_mode]
        bars = [[max(0, srcc - low) for srcc, (low, _) in zip(y, ranges, strict=True)]]
        bars.append([max(0, high - srcc) for srcc, (_, high) in zip(y, ranges, strict=True)])
        label = "no reference" if mode == "NR" else "full reference"
        axes.errorbar(x, y, yerr=bars, fmt="o", color=color, ecolor=color, elinewidth=1, alpha=0.85, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.25, y=0.08)
    axes.set_xlabel("milliseconds per image (median)")
    axes.set_ylabel("SRCC (bars: 95 % interval)")
    axes.legend(loc="best", frameon=False, fontsize=8)
    _tidy(axes)
    _name_points(axes, [(1000 * seconds, srcc, entry.metric) for seconds, srcc, entry in points])
    return _png(figure)


def worst_disagreements(entry: Entry, thumbnails: bool = True) -> list[Disagreement]:
    """The images that the metric overrates most, and those that it underrates most, by its fitted curve."""
    rows = entry.scored
    if entry.agreement.problem is not None:
        return []
    scores, mos = entry.oriented(rows)
    fit = entry.agreement.fit
    predicted = fit(scores) if fit is not None else np.polyval(np.polyfit(scores, mos, 1), scores)
    order = np.argsort(predicted - mos, kind="stable")
    count = min(DISAGREEMENTS, len(rows) // 2)
    sign = -1 if _dmos(entry) else 1
    found = []
    for index in [*reversed(order[-count:].tolist()), *order[:count].tolist()]:
        row = rows[index]
        found.append(
            Disagreement(
                row.path.replace("\\", "/").rsplit("/", 1)[-1],
                _thumbnail(row) if thumbnails else None,
                sign * float(mos[index]),
                sign * float(predicted[index]),
                row.score or 0.0,
                bool(predicted[index] > mos[index]),
            )
        )
    return found


def _dmos(entry: Entry) -> bool:
    return bool(entry.facts["dataset_facts"]["lower_better"])


def _name_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """A name beside each point; names that would touch are moved apart vertically."""
    low, high = axes.get_ylim()
    step = 0.045 * (high - low)
    free = -np.inf
    for x, y, name in sorted(points, key=lambda point: point[1]):
        free = max(free + step, y)
        text = axes.annotate(name, (x, y), (x * 1.1, free), fontsize=8, va="center", color="#111827")
        text.set_in_layout(False)  # a long name must not squeeze the axes away


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, color=GREY)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    # Palette colours are enough for dots and lines, and a third of the size.
    picture = Image.open(buffer).convert("RGB").quantize(64)
    small = io.BytesIO()
    picture.save(small, "PNG", optimize=True)
    return _data_uri(small.getvalue(), "png")


def _thumbnail(row: BenchmarkRow) -> str | None:
    try:
        picture = open_image(row.path)
    except ImageError:  # moved or changed since it was scored: the report does without
        return None
    picture = picture.copy()
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return _data_uri(buffer.getvalue(), "jpeg")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
