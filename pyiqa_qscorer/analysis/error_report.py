"""What a study found: conclusions, tables, and the report on disk (CSV, JSON, pictures, one HTML page)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .. import __version__
from ..report import Picture, Section, Table, data_uri, html_page, number, png, write_output
from .figures import all_figures
from .study import Study

if TYPE_CHECKING:
    from .measured import MeasuredModel

TITLE = "Conversion error of token formulations"
GOOD_CEILING = 0.99


def facts(study: Study) -> list[tuple[str, str]]:
    """What was read, and what was left out."""
    opinions = study.opinions
    left_out = f", {opinions.missing_mos:,} rows without MOS left out" if opinions.missing_mos else ""
    source = "smallest and largest MOS of the table" if opinions.own_range else "stated"
    direction = ", lower is better, mirrored" if opinions.scale.lower_better else ""
    known = opinions.images - opinions.missing_std
    spreads = f"{known:,} of {opinions.images:,} images, {opinions.zero_std:,} of them 0"
    if not known:
        spreads = "none, so no Gaussian labels (--std-column or --vote-columns give them)"
    shown = [
        ("table", str(opinions.path)),
        ("images", f"{opinions.images:,}{left_out}"),
        ("range", f"{opinions.scale.low:g} to {opinions.scale.high:g} ({source}) -> 1 to 5{direction}"),
        ("spread of opinions", spreads),
    ]
    sampled = [row for row in study.rows if row.mae_standard_error > 0]
    if sampled:
        size = f"{sampled[0].images:,} images drawn at random"
        shown.append(("sample", f"labels other than one-hot from {size}; errors.csv has the standard errors"))
    return shown


def conclusions(study: Study, measured: Sequence[MeasuredModel] = ()) -> list[str]:
    """What a reader can take home, a sentence or two each."""
    count = study.detail

    def mae(label: str, values: str, levels: int | None = count) -> str | None:
        row = study.row(label, values, levels)
        return None if row is None else number(row.mae, 4)

    one_hot = study.of("one_hot", "integers")
    detail = next(row for row in one_hot if row.levels == count)
    ceiling = "" if detail.srcc is None else f", and its SRCC is {detail.srcc:.3f} at best"
    found = [
        f"With {count} level words, a network that always chooses the right word still errs by {detail.mae:.3f} on "
        f"average on the scale from 1 to 5{ceiling}."
    ]
    soft = mae("gaussian_pdf_normalised", "integers")
    found.append(
        f"The best possible values for these words leave an error of {mae('one_hot', 'optimal')}"
        + (f", a soft label (Gaussian, as a softmax can learn it) {soft}" if soft else "")
        + f", a score token with regression {mae('score_token', 'float16', None)} (rounding to float16)."
    )
    enough = [row.levels for row in one_hot if row.srcc is not None and row.srcc >= GOOD_CEILING]
    if enough:
        found.append(f"Of the numbers of levels tried, {enough[0]} is the first that allows an SRCC of {GOOD_CEILING}.")
    else:
        found.append(f"No number of levels tried (up to {one_hot[-1].levels}) allows an SRCC of {GOOD_CEILING}.")
    for model in measured:
        share = model.conversion_part / model.error.rmse**2 if model.error.rmse else 0.0
        found.append(
            f"{model.name} ({_spaced(model.formulation)}) errs by {number(model.error.mae)} on average; the conversion "
            f"alone would make {number(model.predicted.mae)}, {share:.0%} of its squared error."
        )
    return found


def tables(study: Study, measured: Sequence[MeasuredModel] = ()) -> list[Table]:
    """The tables for the terminal, the measured ones last."""
    shown = (row for row in study.rows if row.levels in (study.detail, None))
    rows = [((_spaced(row.label), _spaced(row.values)), row) for row in shown]
    return [
        Table(
            f"Conversion error, {study.detail} levels",
            ("label", "values", "MAE", "RMSE", "bias", "largest", "SRCC", "PLCC", "KRCC"),
            [(*name, *_numbers(row, "mae rmse bias max_error srcc plcc krcc")) for name, row in rows],
            words=2,
        ),
        Table(
            f"Parts of the squared error, {study.detail} levels",
            ("label", "values", "E eps^2", "label", "restoration", "cross"),
            [(*name, *_numbers(row, "mse label_part restoration_part cross_term")) for name, row in rows],
            words=2,
        ),
        _by_levels(study),
        *_measured_tables(measured),
    ]


def more_tables(study: Study) -> list[Table]:
    """Tables that only the page shows."""
    return [
        Table(
            "Mass that leaks to other words, summed over the open set",
            ("label", "levels", "leaked share", "MAE"),
            [(_spaced(row.label), str(row.levels), f"{row.share:.0%}", *_numbers(row, "mae")) for row in study.leaks],
        ),
        Table(
            f"Noise on each logit, or on the regressed score, {study.detail} levels",
            ("formulation", "noise", "RMSE", "second-order formula", "MAE", "SRCC"),
            [
                (_spaced(item.formulation), f"{item.noise:g}", *_numbers(item, "rmse analytic_rmse mae srcc"))
                for item in study.noise
            ],
        ),
    ]


def _by_levels(study: Study) -> Table:
    wanted = {
        "integers": ("one_hot", "integers"),
        "centres": ("one_hot", "interval_centers"),
        "optimal": ("one_hot", "optimal"),
        "pdf": ("gaussian_pdf", "integers"),
        "sum 1": ("gaussian_pdf_normalised", "integers"),
    }
    columns = {name: found for name, key in wanted.items() if (found := study.of(*key))}
    rows = [
        (
            str(one_hot.levels),
            *(number(column[place].mae, 4) for column in columns.values()),
            *_numbers(one_hot, "uniform_mae srcc krcc"),
        )
        for place, one_hot in enumerate(columns["integers"])
    ]
    title = (
        "MAE by number of levels (one-hot: integers, centres, optimal; Gaussian pdf, adjusted; the same, sum 1; "
        "integers, uniform MOS), and ceilings of one-hot levels"
    )
    return Table(title, ("K", *columns, "uniform", "SRCC", "KRCC"), rows, words=0)


def _measured_tables(measured: Sequence[MeasuredModel]) -> list[Table]:
    named = [(model, (model.name, _spaced(model.formulation))) for model in measured]
    found = [
        Table(
            "Trained networks: measured error, and the conversion error predicted for these images (predicted ...)",
            ("checkpoint", "formulation", "images", "MAE", "RMSE", "SRCC", "pr. MAE", "pr. RMSE", "pr. SRCC"),
            [
                (
                    *(*names, str(model.images)),
                    *_numbers(model.error, "mae rmse srcc"),
                    *_numbers(model.predicted, "mae rmse srcc"),
                )
                for model, names in named
            ],
            words=2,
        ),
        Table(
            "Parts of the measured squared error",
            ("checkpoint", "formulation", "E (score - y)^2", "fitting", "conversion", "cross"),
            [
                (*names, number(model.error.rmse**2, 4), *_numbers(model, "fitting_part conversion_part cross_term"))
                for model, names in named
            ],
            words=2,
        ),
        Table(
            "Images whose most likely level is right: measured error beside predicted conversion error",
            ("checkpoint", "share", "MAE", "pr. MAE", "peak probability", "leaked mass"),
            [
                (model.name, *_numbers(model.right, "share mae predicted_mae"), *_numbers(model, "peak leaked_mass"))
                for model in measured
                if model.right
            ],
        ),
        Table(
            "The same probabilities restored in other ways (optimal: fitted to these images)",
            ("checkpoint", "reading", "MAE", "RMSE", "bias", "SRCC", "PLCC", "KRCC"),
            [
                (model.name, _spaced(reading), *_numbers(error, "mae rmse bias srcc plcc krcc"))
                for model in measured
                for reading, error in model.readings.items()
            ],
            words=2,
        ),
    ]
    return [table for table in found if table.rows]


def as_json(study: Study, measured: Sequence[MeasuredModel] = ()) -> dict[str, Any]:
    """Everything found, for programs: plain numbers, None for what is undefined."""
    opinions = study.opinions
    return {
        "version": __version__,
        "conclusions": conclusions(study, measured),
        "dataset": {
            "table": str(opinions.path),
            **{name: getattr(opinions, name) for name in ("images", "missing_mos", "missing_std", "zero_std")},
            "range": [opinions.scale.low, opinions.scale.high],
            "own_range": opinions.own_range,
            "lower_better": opinions.scale.lower_better,
            "vote_shares": None if opinions.vote_shares is None else opinions.vote_shares.tolist(),
        },
        "detail": study.detail,
        "errors": [dataclasses.asdict(row) for row in study.rows],
        "leaked_mass": [dataclasses.asdict(row) for row in study.leaks],
        "noise": [dataclasses.asdict(row) for row in study.noise],
        "histogram": study.histogram.tolist(),
        "bounds": {str(count): {"srcc": srcc, "krcc": krcc} for count, (srcc, krcc) in study.bounds.items()},
        "level_shares": study.level_shares.tolist(),
        "optimal_values": study.level_values.tolist(),
        "soft_shares": {name: shares.tolist() for name, shares in study.soft_shares.items()},
        "measured": [dataclasses.asdict(model) for model in measured],
    }


def write_report(folder: Path, study: Study, measured: Sequence[MeasuredModel] = ()) -> Path:
    """Write errors.csv (one row per formulation), errors.json (everything), errors.html and the pictures as PNG.

    Each file appears whole or not at all. Returns the path of the page. Raises `OutputError`: it cannot be written.
    """
    drawn = {name: (png(figure), caption) for name, (figure, caption) in all_figures(study, measured).items()}
    pictures = [Picture(data_uri(data), name.replace("_", " "), caption) for name, (data, caption) in drawn.items()]
    sections = [
        Section("What follows", items=conclusions(study, measured)),
        Section("Pictures", pictures=pictures),
        Section("Tables", tables=[*tables(study, measured), *more_tables(study)]),
        Section("What was read", items=[f"{name}: {text}" for name, text in facts(study)]),
    ]
    lead = [
        "What it costs to say a mean opinion score (MOS) as one of K level words, as a soft label over them, or as a "
        "number beside a score token: the error that remains when a network predicts every label exactly."
    ]
    content: dict[str, str | bytes] = {
        "errors.csv": pd.DataFrame(study.rows, dtype=object).to_csv(index=False, lineterminator="\n"),
        "errors.json": json.dumps(as_json(study, measured), indent=1, allow_nan=False) + "\n",
        **{f"{name}.png": data for name, (data, _) in drawn.items()},
        "errors.html": html_page(TITLE, lead, sections),
    }
    for name, data in content.items():
        write_output(folder / name, data)
    return folder / "errors.html"


def _spaced(name: str) -> str:
    """A name of the program as words, which a narrow table can break."""
    return name.replace("_", " ")


def _numbers(row: Any, names: str) -> tuple[str, ...]:
    """Attributes of `row`, as shown."""
    return tuple(number(getattr(row, name), 4) for name in names.split())
