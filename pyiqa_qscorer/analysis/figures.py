"""Pictures of a study. Drawn without pyplot, so nothing global is touched and no display is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..data.labels import Floats, level_centers, level_index, restore
from .conversion_error import HIGH, LOW, make_label
from .study import Study

if TYPE_CHECKING:
    from .measured import MeasuredModel

MARKED_LEVELS = (5, 10, 20)
COLORS = {
    "one_hot integers": "#c0392b",
    "one_hot interval_centers": "#e08e0b",
    "one_hot optimal": "#7d6608",
    "linear integers": "#7f8c8d",
    "gaussian_pdf integers": "#1f618d",
    "gaussian_pdf_normalised integers": "#5dade2",
    "gaussian_cdf integers": "#196f3d",
    "score_token": "#6c3483",
}
NAMES = {
    "one_hot integers": "one-hot, integers",
    "one_hot interval_centers": "one-hot, interval centres",
    "one_hot optimal": "one-hot, optimal values",
    "linear integers": "linear interpolation",
    "gaussian_pdf integers": "Gaussian pdf, adjusted",
    "gaussian_pdf_normalised integers": "the same, sum 1",
    "gaussian_cdf integers": "Gaussian cdf, adjusted",
    "score_token": "score token + regression",
}
_NOISE_KEYS = {name: f"{name} integers" for name in ("one_hot", "linear", "gaussian_pdf", "gaussian_cdf")}


def all_figures(study: Study, measured: Sequence[MeasuredModel] = ()) -> dict[str, Figure]:
    """Every picture, by file name without ending."""
    figures = {
        "error_against_mos": error_against_mos(study),
        "error_against_levels": error_against_levels(study),
        "label_histograms": label_histograms(study),
        "rank_ceilings": rank_ceilings(study),
        "noise": noise(study),
    }
    if measured:
        figures["measured"] = measured_errors(measured)
    return figures


def error_against_mos(study: Study) -> Figure:
    """Signed error over the scale: exact for one-hot levels, one point per image for Gaussian labels."""
    figure, (top, bottom) = _axes(2, 1, (8, 6.2), height_ratios=(3, 1), sharex=True)
    mos = np.linspace(LOW, HIGH, 4001)
    index = level_index(mos, study.detail)
    for kind, values in (
        ("integers", level_centers(study.detail)),
        ("interval_centers", level_centers(study.detail, kind="interval_centers")),
        ("optimal", study.level_values),
    ):
        error = values[index] - mos
        error[1:][np.diff(index) > 0] = np.nan  # no vertical line at a border
        top.plot(mos, error, **_style(f"one_hot {kind}"), linewidth=1.4)
    y, std = study.sample
    known = np.isfinite(std)
    if known.any():
        y, std = y[known][:10_000], std[known][:10_000]
        restored = restore(make_label("gaussian_pdf", y, std, study.detail), level_centers(study.detail))
        top.plot(y, restored - y, ".", **_style("gaussian_pdf integers"), markersize=1.5, alpha=0.5, rasterized=True)
    top.axhline(0, color=COLORS["score_token"], linewidth=1.2, label=NAMES["score_token"])
    top.set_ylabel("restored - MOS")
    top.set_title(f"Conversion error over the scale, {study.detail} levels")
    _legend(top, ncols=2)
    edges = np.linspace(LOW, HIGH, len(study.histogram) + 1)
    bottom.stairs(study.histogram, edges, fill=True, color="#bdc3c7")
    bottom.set_xlabel("MOS on 1..5")
    bottom.set_ylabel("images")
    return figure


def error_against_levels(study: Study) -> Figure:
    """Mean absolute error for every K, with the closed forms for a uniform MOS and the floors of number formats."""
    figure, (axis,) = _axes(1, 1, (8, 5))
    for key in list(NAMES)[:-1]:
        label, values = key.split()
        levels, found = _series(study, label, values, "mae")
        if label != "linear" and levels:
            axis.plot(levels, found, "o-", **_style(key), markersize=3)
    for values in ("integers", "interval_centers"):
        levels, found = _series(study, "one_hot", values, "uniform_mae")
        style = _style(f"one_hot {values}")
        axis.plot(levels, found, "--", color=style["color"], linewidth=1, label=f"{style['label']}: uniform MOS")
    for dtype, line in (("bfloat16", (0, (5, 2))), ("float16", (0, (1, 1.5)))):
        row = study.row("score_token", dtype, None)
        if row is not None:
            axis.axhline(
                row.mae, color=COLORS["score_token"], linewidth=1, linestyle=line, label=f"score token in {dtype}"
            )
    axis.set_yscale("log")
    axis.set_ylim(bottom=3e-4)  # what is exact but for rounding lies far below
    axis.set_xlabel("levels K")
    axis.set_ylabel("mean absolute error (1..5 scale)")
    axis.set_title("Conversion error against the number of levels")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def label_histograms(study: Study) -> Figure:
    """How the labels spread over the levels, beside the people's own votes where the table has them."""
    figure, (axis,) = _axes(1, 1, (8, 4))
    bars: list[tuple[str, Floats, str]] = [("one-hot", study.level_shares, COLORS["one_hot integers"])]
    for name in ("gaussian_pdf_raw", "gaussian_pdf", "gaussian_cdf"):
        if name in study.soft_shares:
            color = "#aed6f1" if name.endswith("raw") else COLORS[f"{name} integers"]
            bars.append((name.replace("_", " "), study.soft_shares[name], color))
    votes = study.opinions.vote_shares
    if votes is not None and len(votes) == study.detail:
        bars.append(("votes (their own scale)", votes, "#7f8c8d"))
    width = 0.8 / len(bars)
    places = np.arange(study.detail)
    for number, (name, shares, color) in enumerate(bars):
        axis.bar(places - 0.4 + (number + 0.5) * width, shares, width, label=name, color=color)
    axis.set_xticks(places, [f"level {place + 1}" for place in places])
    axis.set_ylabel("share of images (mean label)")
    axis.set_title(f"Labels over {study.detail} levels")
    _legend(axis)
    return figure


def rank_ceilings(study: Study) -> Figure:
    """SRCC and KRCC that remain when every label is predicted exactly."""
    figure, axes = _axes(1, 2, (10, 4.4))
    for number, (axis, measure) in enumerate(zip(axes, ("srcc", "krcc"), strict=True)):
        levels, found = _series(study, "one_hot", "integers", measure)
        axis.plot(levels, found, "o-", **_style("one_hot integers") | {"label": "one-hot levels"}, markersize=3)
        bound = [study.bounds[count][number] for count in levels]
        axis.plot(levels, bound, "--", color="#566573", linewidth=1, label="K equally filled levels (upper bound)")
        soft_levels, soft = _series(study, "gaussian_pdf_normalised", "integers", measure)
        if soft_levels:
            color = COLORS["gaussian_pdf_normalised integers"]
            axis.plot(soft_levels, soft, "-", color=color, linewidth=1.2, label="Gaussian pdf, adjusted, sum 1")
        for count in MARKED_LEVELS:
            if count in levels:
                value = found[levels.index(count)]
                axis.plot([count], [value], "o", color=COLORS["one_hot integers"], markersize=7, fillstyle="none")
                at_end = count == levels[-1]
                axis.annotate(
                    f"K = {count}: {value:.4f}",
                    (count, value),
                    (4 if at_end else 6, -16),
                    textcoords="offset points",
                    fontsize=8,
                    horizontalalignment="right" if at_end else "left",
                )
        axis.set_xlabel("levels K")
        axis.set_ylabel(f"highest {measure.upper()}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25, linewidth=0.5)
        _legend(axis, loc="lower right")
    figure.suptitle("Best rank correlation with the MOS when every label is predicted exactly")
    return figure


def noise(study: Study) -> Figure:
    """Error and SRCC of a network that knows every label, with noise on the numbers it emits."""
    figure, axes = _axes(1, 2, (10, 4.4))
    for name in dict.fromkeys(item.formulation for item in study.noise):
        items = [item for item in study.noise if item.formulation == name]
        style = _style(_NOISE_KEYS.get(name, name))
        size = [item.noise for item in items]
        axes[0].plot(size, [item.rmse for item in items], "o-", **style, markersize=3)
        small = [item for item in items if item.noise <= 1]
        formula = [item.analytic_rmse for item in small]
        axes[0].plot([item.noise for item in small], formula, ":", color=style["color"], linewidth=1)
        axes[1].plot(size, [item.srcc for item in items], "o-", **style, markersize=3)
    axes[0].set_ylim(0, 1.05)
    axes[0].set_ylabel("RMSE (dotted: second-order formula)")
    axes[1].set_ylabel("SRCC")
    for axis in axes:
        axis.set_xlabel("noise on each logit, or on the regressed score")
        axis.grid(alpha=0.25, linewidth=0.5)
    _legend(axes[0], loc="upper left")
    figure.suptitle(f"Noise in what the network emits, {study.detail} levels")
    return figure


def measured_errors(measured: Sequence[MeasuredModel]) -> Figure:
    """Predicted conversion error beside what trained networks do on labelled pictures."""
    figure, (axis,) = _axes(1, 1, (max(6.0, 2.4 * len(measured) + 2), 4.2))
    places = np.arange(len(measured))
    bars = (
        ("predicted conversion error", [m.predicted.rmse for m in measured], "#c0392b"),
        ("distance to its own target", [math.sqrt(m.fitting_part) for m in measured], "#bdc3c7"),
        ("whole error", [m.error.rmse for m in measured], "#34495e"),
    )
    for number, (name, values, color) in enumerate(bars):
        found = axis.bar(places + (number - 1) * 0.27, values, 0.26, label=name, color=color)
        axis.bar_label(found, fmt="%.3f", fontsize=8)
    axis.set_xticks(places, [f"{m.name}\n{m.formulation}" for m in measured], fontsize=8)
    axis.set_ylabel("root mean square (1..5 scale)")
    axis.set_title("Error of trained networks")
    axis.margins(y=0.25)
    _legend(axis, loc="upper right", ncols=3)
    return figure


def _axes(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def _series(study: Study, label: str, values: str, measure: str) -> tuple[list[int], list[float]]:
    rows = [row for row in study.rows if (row.label, row.values) == (label, values) and row.levels is not None]
    return [row.levels for row in rows if row.levels is not None], [getattr(row, measure) for row in rows]


def _style(key: str) -> dict[str, Any]:
    return {"color": COLORS[key], "label": NAMES[key]}


def _legend(axis: Axes, **options: Any) -> None:
    axis.legend(fontsize=8, frameon=False, **options)
