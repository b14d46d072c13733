"""What a study found, as tables of text: for the terminal and for the HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .error_rows import ErrorRow
from .study import Study

if TYPE_CHECKING:
    from .measured import MeasuredModel


_ROUNDING = 1e-12  # numbers below are 0 but for rounding


@dataclass(frozen=True)
class ReportTable:
    """Cells as shown. `brief`: also for the terminal. The first `words` columns hold words, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    brief: bool = True
    words: int = 1


def facts(study: Study) -> list[tuple[str, str]]:
    """What was read, and what was left out."""
    opinions = study.opinions
    left_out = f", {opinions.missing_mos:,} rows without MOS left out" if opinions.missing_mos else ""
    source = "smallest and largest MOS of the table" if opinions.own_range else "stated"
    direction = ", lower is better, mirrored" if opinions.lower_better else ""
    known = opinions.images - opinions.missing_std
    spreads = f"{known:,} of {opinions.images:,} images, {opinions.zero_std:,} of them 0"
    if not known:
        spreads = "none, so no Gaussian labels (--std-column or --vote-columns give them)"
    shown = [
        ("table", str(opinions.path)),
        ("images", f"{opinions.images:,}{left_out}"),
        ("range", f"{opinions.low:g} to {opinions.high:g} ({source}) -> 1 to 5{direction}"),
        ("spread of opinions", spreads),
    ]
    sampled = [row for row in study.rows if row.mae_standard_error > 0]
    if sampled:
        size = f"{sampled[0].images:,} images drawn at random"
        shown.append(("sample", f"labels other than one-hot from {size}; errors.csv has the standard errors"))
    return shown


def tables(study: Study, measured: Sequence[MeasuredModel] = ()) -> list[ReportTable]:
    """Every table, the measured ones last."""
    detail = [row for row in study.rows if row.levels in (study.detail, None)]
    return [
        ReportTable(
            f"Conversion error, {study.detail} levels",
            ("label", "values", "MAE", "RMSE", "bias", "largest", "SRCC", "PLCC", "KRCC"),
            [(*_words(row), *_numbers(row, "mae rmse bias max_error srcc plcc krcc")) for row in detail],
            words=2,
        ),
        ReportTable(
            f"Parts of the squared error, {study.detail} levels",
            ("label", "values", "E eps^2", "label", "restoration", "cross"),
            [(*_words(row), *_numbers(row, "mse label_part restoration_part cross_term")) for row in detail],
            words=2,
        ),
        _by_levels(study),
        ReportTable(
            "Closed form and simulation, uniform MOS, one-hot levels",
            ("values", "K", "E eps^2", "simulated", "standard error", "E |eps|", "simulated", "standard error"),
            [
                (_spaced(check.values), str(check.levels), *_numbers(check, _UNIFORM, digits=6))
                for check in sorted(study.uniform, key=lambda check: check.values, reverse=True)
            ],
            brief=False,
        ),
        ReportTable(
            "Mass that leaks to other words, summed over the open set",
            ("label", "levels", "leaked share", "MAE"),
            [(_spaced(row.label), str(row.levels), f"{row.share:.0%}", *_numbers(row, "mae")) for row in study.leaks],
            brief=False,
        ),
        ReportTable(
            f"Noise on each logit, or on the regressed score, {study.detail} levels",
            ("formulation", "noise", "RMSE", "second-order formula", "MAE", "SRCC"),
            [
                (_spaced(item.formulation), f"{item.noise:g}", *_numbers(item, "rmse analytic_rmse mae srcc"))
                for item in study.noise
            ],
            brief=False,
        ),
        *_measured_tables(measured),
    ]


_UNIFORM = "mse simulated_mse mse_standard_error mae simulated_mae mae_standard_error"


def _by_levels(study: Study) -> ReportTable:
    wanted = {
        "integers": ("one_hot", "integers"),
        "centres": ("one_hot", "interval_centers"),
        "optimal": ("one_hot", "optimal"),
        "pdf adjusted": ("gaussian_pdf", "integers"),
        "its sum 1": ("gaussian_pdf_normalised", "integers"),
    }
    found = {name: [row for row in study.rows if (row.label, row.values) == key] for name, key in wanted.items()}
    columns = {name: rows for name, rows in found.items() if rows}
    rows = [
        (
            str(one_hot.levels),
            *(_number(column[place].mae) for column in columns.values()),
            *_numbers(one_hot, "uniform_mae srcc krcc"),
        )
        for place, one_hot in enumerate(columns["integers"])
    ]
    return ReportTable(
        "MAE by number of levels (one-hot: integers, centres, optimal), and ceilings of one-hot levels",
        ("K", *columns, "uniform MOS, integers", "SRCC", "KRCC"),
        rows,
        words=0,
    )


def _measured_tables(measured: Sequence[MeasuredModel]) -> list[ReportTable]:
    if not measured:
        return []
    found = [
        ReportTable(
            "Trained networks: measured error, and the conversion error predicted for these images",
            ("checkpoint", "formulation", "images", "MAE", "RMSE", "SRCC", "conversion: MAE", "RMSE", "SRCC"),
            [
                (
                    *(model.name, _spaced(model.formulation), str(model.images)),
                    *_numbers(model.error, "mae rmse srcc"),
                    *_numbers(model.predicted, "mae rmse srcc"),
                )
                for model in measured
            ],
            words=2,
        ),
        ReportTable(
            "Parts of the measured squared error",
            ("checkpoint", "formulation", "E (score - y)^2", "fitting", "conversion", "cross"),
            [
                (
                    *(model.name, _spaced(model.formulation), _number(model.error.rmse**2)),
                    *_numbers(model, "fitting_part conversion_part cross_term"),
                )
                for model in measured
            ],
            words=2,
        ),
    ]
    if not any(model.right for model in measured):
        return found
    return [
        *found,
        ReportTable(
            "Images whose most likely level is right: measured error beside predicted conversion error",
            ("checkpoint", "share", "MAE", "conversion MAE", "peak probability", "leaked mass"),
            [
                (model.name, *_numbers(model.right, "share mae predicted_mae"), *_numbers(model, "peak leaked_mass"))
                for model in measured
                if model.right
            ],
        ),
        ReportTable(
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


def _spaced(name: str) -> str:
    """A name of the program as words, which a narrow table can break."""
    return name.replace("_", " ")


def _words(row: ErrorRow) -> tuple[str, str]:
    return _spaced(row.label), _spaced(row.values)


def _numbers(row: Any, names: str, digits: int = 4) -> tuple[str, ...]:
    """Attributes of `row`, as shown."""
    return tuple(_number(getattr(row, name), digits) for name in names.split())


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return ""
    if math.isnan(value):
        return "undefined"
    small = _ROUNDING < abs(value) < 0.5 * 10.0**-digits
    return f"{value:.0e}" if small else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus zero
