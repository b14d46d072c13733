"""Pictures of a study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..data.labels import Floats, level_centers, level_index, restore
from ..data.opinions import HIGH, LOW
from ..report import legend_below, log_ticks, new_axes
from .conversion_error import make_label
from .study import Study

if TYPE_CHECKING:
    from .measured import MeasuredModel

EXACT = 1e-9  # errors below are rounding, and have no place on a logarithmic axis
STYLES = {
    "one_hot integers": ("#c0392b", "one-hot, integers"),
    "one_hot interval_centers": ("#e08e0b", "one-hot, interval centres"),
    "one_hot optimal": ("#7d6608", "one-hot, optimal values"),
    "linear integers": ("#7f8c8d", "linear interpolation"),
    "gaussian_pdf integers": ("#1f618d", "Gaussian pdf, adjusted"),
    "gaussian_pdf_normalised integers": ("#5dade2", "the same, sum 1"),
    "gaussian_cdf integers": ("#196f3d", "Gaussian cdf, adjusted"),
    "score_token": ("#6c3483", "score token + regression"),
}
"""Colour and name of each formulation."""


def all_figures(study: Study, measured: Sequence[MeasuredModel] = ()) -> dict[str, tuple[Figure, str]]:
    """Every picture with its caption, which says what it shows, by file name without ending."""
    figures = {
        "error_against_levels": (
            error_against_levels(study),
            "Mean absolute error against the number of levels. Dashed: closed form for a uniform MOS. Horizontal: a "
            "score token in two number formats. Where labels are restored exactly there is no point.",
        ),
        "rank_ceilings": (
            rank_ceilings(study),
            "Best rank correlation with the MOS when every label is predicted exactly. Dashed: K equally filled "
            "levels, the upper bound of every split.",
        ),
        "error_against_mos": (
            error_against_mos(study),
            f"Conversion error over the scale, {study.detail} levels, and how many images have which MOS.",
        ),
        "label_histograms": (label_histograms(study), f"How the labels spread over {study.detail} levels."),
        "noise": (
            noise(study),
            f"Noise in the numbers that the network emits, {study.detail} levels. Dotted: second-order formula.",
        ),
    }
    if measured:
        figures["measured"] = (measured_errors(measured), "Error of trained networks, beside the predicted one.")
    return figures


def error_against_mos(study: Study) -> Figure:
    """Signed error over the scale: exact for one-hot levels, one point per image for Gaussian labels."""
    figure, (top, bottom) = new_axes(2, (5.2, 5.2), height_ratios=(3, 1), sharex=True)
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
    top.axhline(0, linewidth=1.2, **_style("score_token"))
    top.set_ylabel("restored - MOS")
    legend_below(figure, top)
    edges = np.linspace(LOW, HIGH, len(study.histogram) + 1)
    bottom.stairs(study.histogram, edges, fill=True, color="#bdc3c7")
    bottom.set(xlabel="MOS on 1..5", ylabel="images")
    return figure


def error_against_levels(study: Study) -> Figure:
    """Mean absolute error for every K, with the closed forms for a uniform MOS and the floors of number formats."""
    figure, (axis,) = new_axes(size=(5.2, 5.0))
    shown: list[float] = []
    for key in STYLES:
        if key in ("linear integers", "score_token"):  # the first restores exactly, the second has no levels
            continue
        levels, found = _series(study, key, "mae")
        if levels:
            found = np.where(found > EXACT, found, np.nan)
            axis.plot(levels, found, "o-", **_style(key), markersize=3)
            shown += found.tolist()
    for key in ("one_hot integers", "one_hot interval_centers"):
        axis.plot(*_series(study, key, "uniform_mae"), "--", color=STYLES[key][0], linewidth=1)
    color = STYLES["score_token"][0]
    for dtype, line in (("bfloat16", (0, (5, 2))), ("float16", (0, (1, 1.5)))):
        row = study.row("score_token", dtype, None)
        if row is not None:
            axis.axhline(row.mae, color=color, linewidth=1.2, linestyle=line, label=f"score token, {dtype}")
            shown.append(row.mae)
    axis.set(xlabel="levels K", ylabel="mean absolute error (1..5 scale)", yscale="log")
    axis.set_ylim(bottom=min((value for value in shown if value > EXACT), default=1e-3) / 1.5)
    log_ticks(axis.yaxis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure, axis)
    return figure


def label_histograms(study: Study) -> Figure:
    """How the labels spread over the levels, beside the people's own votes where the table has them."""
    figure, (axis,) = new_axes(size=(5.2, 3.8))
    bars: list[tuple[str, Floats, str]] = [("one-hot", study.level_shares, STYLES["one_hot integers"][0])]
    for name in ("gaussian_pdf_raw", "gaussian_pdf", "gaussian_cdf"):
        if name in study.soft_shares:
            color = "#aed6f1" if name.endswith("raw") else STYLES[f"{name} integers"][0]
            bars.append((name.replace("_", " "), study.soft_shares[name], color))
    votes = study.opinions.vote_shares
    if votes is not None and len(votes) == study.detail:
        bars.append(("votes (their own scale)", votes, "#7f8c8d"))
    width = 0.8 / len(bars)
    places = np.arange(study.detail)
    for number, (name, shares, color) in enumerate(bars):
        axis.bar(places - 0.4 + (number + 0.5) * width, shares, width, label=name, color=color)
    axis.set_xticks(places, [str(place + 1) for place in places])
    axis.set(xlabel="level", ylabel="share of images (mean label)")
    legend_below(figure, axis)
    return figure


def rank_ceilings(study: Study) -> Figure:
    figure, axes = new_axes(2, (5.2, 5.6), sharex=True)
    for number, (axis, measure) in enumerate(zip(axes, ("srcc", "krcc"), strict=True)):
        levels, found = _series(study, "one_hot integers", measure)
        axis.plot(levels, found, "o-", **_style("one_hot integers") | {"label": "one-hot levels"}, markersize=3)
        bound = [study.bounds[count][number] for count in levels]
        axis.plot(levels, bound, "--", color="#566573", linewidth=1, label="K equally filled levels")
        soft_levels, soft = _series(study, "gaussian_pdf_normalised integers", measure)
        if soft_levels:
            style = _style("gaussian_pdf_normalised integers") | {"label": "Gaussian pdf, adjusted, sum 1"}
            axis.plot(soft_levels, soft, "-", **style, linewidth=1.2)
        axis.set_ylabel(f"highest {measure.upper()}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("levels K")
    legend_below(figure, axes[0], columns=1)
    return figure


def noise(study: Study) -> Figure:
    figure, axes = new_axes(2, (5.2, 5.8), sharex=True)
    for name in dict.fromkeys(item.formulation for item in study.noise):
        items = [item for item in study.noise if item.formulation == name]
        style = _style(name if name in STYLES else f"{name} integers")
        size = [item.noise for item in items]
        axes[0].plot(size, [item.rmse for item in items], "o-", **style, markersize=3)
        small = [item for item in items if item.noise <= 1]
        formula = [item.analytic_rmse for item in small]
        axes[0].plot([item.noise for item in small], formula, ":", color=style["color"], linewidth=1)
        axes[1].plot(size, np.array([item.srcc for item in items], np.float64), "o-", **style, markersize=3)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("RMSE")
    axes[1].set(xlabel="noise on each logit, or on the regressed score", ylabel="SRCC")
    legend_below(figure, axes[0])
    return figure


def measured_errors(measured: Sequence[MeasuredModel]) -> Figure:
    figure, (axis,) = new_axes(size=(5.2, 1.6 + 1.1 * len(measured)))
    places = np.arange(len(measured))
    bars = (
        ("predicted conversion error", [m.predicted.rmse for m in measured], "#c0392b"),
        ("distance to its own target", [math.sqrt(m.fitting_part) for m in measured], "#bdc3c7"),
        ("whole error", [m.error.rmse for m in measured], "#34495e"),
    )
    for number, (name, values, color) in enumerate(bars):
        found = axis.barh(places + (number - 1) * 0.27, values, 0.26, label=name, color=color)
        axis.bar_label(found, fmt="%.3f", fontsize=8, padding=2)
    axis.set_yticks(places, [f"{m.name}\n{m.formulation.replace('_', ' ')}" for m in measured])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("root mean square (1..5 scale)")
    legend_below(figure, axis, columns=1)
    return figure


def _series(study: Study, key: str, measure: str) -> tuple[list[int], Floats]:
    """Numbers of levels, and a measure of each; NaN where it is not defined. `key` as in `STYLES`."""
    rows = study.of(*key.split())
    return [row.levels or 0 for row in rows], np.array([getattr(row, measure) for row in rows], np.float64)


def _style(key: str) -> dict[str, Any]:
    color, label = STYLES[key]
    return {"color": color, "label": label}
