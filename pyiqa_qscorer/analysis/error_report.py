"""The report of a study on disk: CSV, JSON, pictures, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import QScorerError
from ..files import write_bytes
from .error_rows import ErrorRow
from .figures import all_figures
from .study import Study
from .study_tables import ReportTable, facts, tables

if TYPE_CHECKING:
    from .measured import MeasuredModel


def as_json(study: Study, measured: Sequence[MeasuredModel] = ()) -> dict[str, Any]:
    """Everything found, for programs: plain numbers, None for what is undefined."""
    opinions = study.opinions
    return _plain(
        {
            "version": __version__,
            "dataset": {
                "table": str(opinions.path),
                "images": opinions.images,
                "missing_mos": opinions.missing_mos,
                "missing_std": opinions.missing_std,
                "zero_std": opinions.zero_std,
                "range": [opinions.low, opinions.high],
                "own_range": opinions.own_range,
                "lower_better": opinions.lower_better,
                "vote_shares": None if opinions.vote_shares is None else opinions.vote_shares.tolist(),
            },
            "detail": study.detail,
            "errors": [dataclasses.asdict(row) for row in study.rows],
            "uniform": [dataclasses.asdict(row) for row in study.uniform],
            "leaked_mass": [dataclasses.asdict(row) for row in study.leaks],
            "noise": [dataclasses.asdict(row) for row in study.noise],
            "histogram": study.histogram.tolist(),
            "bounds": {str(count): {"srcc": srcc, "krcc": krcc} for count, (srcc, krcc) in study.bounds.items()},
            "level_shares": study.level_shares.tolist(),
            "optimal_values": study.level_values.tolist(),
            "soft_shares": {name: shares.tolist() for name, shares in study.soft_shares.items()},
            "measured": [dataclasses.asdict(model) for model in measured],
        }
    )


def write_report(folder: Path, study: Study, measured: Sequence[MeasuredModel] = ()) -> Path:
    """Write errors.csv (one row per formulation), errors.json (everything), errors.html and the pictures as PNG.

    Each file appears whole or not at all; those of an earlier report are replaced.

    Returns:
        the HTML page.

    Raises:
        QScorerError: the folder cannot be written.
    """
    pictures = {}
    for name, figure in all_figures(study, measured).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        pictures[name] = buffer.getvalue()
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in dataclasses.fields(ErrorRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_plain([dataclasses.asdict(row) for row in study.rows]))
    content = {
        "errors.csv": table.getvalue().encode(),
        "errors.json": (json.dumps(as_json(study, measured), indent=1, allow_nan=False) + "\n").encode(),
        **{f"{name}.png": picture for name, picture in pictures.items()},
        "errors.html": _page(study, measured, pictures).encode(),
    }
    try:
        for name, data in content.items():
            write_bytes(folder / name, data)
    except OSError as error:
        raise QScorerError(f"the report cannot be written to {folder}: {error}") from error
    return folder / "errors.html"


def _plain(value: Any) -> Any:
    """NaN, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
th { color: #666; font-weight: 600; } .word { text-align: left; }
.wide { overflow-x: auto; } img { max-width: 100%; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def _page(study: Study, measured: Sequence[MeasuredModel], pictures: dict[str, bytes]) -> str:
    told = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts(study))
    images = "".join(
        f'<p><img alt="{name.replace("_", " ")}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>'
        for name, data in pictures.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Conversion error</title>'
        f"<style>{_STYLE}</style></head><body><h1>Conversion error of token formulations</h1><dl>{told}</dl>"
        "<p>Error that remains when a network predicts every label exactly; scores on the 1..5 scale.</p>"
        f"{images}{''.join(_html_table(table) for table in tables(study, measured))}"
        f"<p>pyiqa-qscorer {html.escape(__version__)}</p></body></html>\n"
    )


def _html_table(table: ReportTable) -> str:
    def row(tag: str, cells: tuple[str, ...]) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=word' if place < table.words else ''}>{html.escape(cell)}</{tag}>"
                for place, cell in enumerate(cells)
            )
            + "</tr>"
        )

    body = "".join(row("td", cells) for cells in table.rows)
    head = row("th", table.columns)
    return f"<h2>{html.escape(table.title)}</h2><div class=wide><table>{head}{body}</table></div>"
