"""What `pyiqa-qscorer benchmark` prints: results to stdout, what failed to stderr."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..errors import InputError
from . import console as cli_output
from .console import printable, say

if TYPE_CHECKING:
    from ..evaluation.published import PublishedDifference
    from ..evaluation.results import Leaderboard
    from ..evaluation.runner import Problem


def print_leaderboard(board: Leaderboard) -> None:
    """A table per dataset, best first."""
    from ..evaluation.number_format import number, number_with_interval, seconds_words

    for dataset in board.datasets:
        table = _plain_table(dataset)
        for name in ("metric", "kind", "SRCC [95 %]", "PLCC", "fitted", "KRCC", "images", "s/image"):
            table.add_column(name, justify="left" if name in ("metric", "kind") else "right", no_wrap=True)
        for entry in board.of(dataset):
            if not entry.rows:
                continue
            found = entry.agreement
            table.add_row(
                Text(printable(entry.metric), style="bold" if entry.not_worse_than_best else ""),
                entry.facts["mode"],
                Text(number_with_interval(found.srcc, entry.intervals.get("srcc"))),
                number(found.plcc),
                number(found.plcc_fitted),
                number(found.krcc),
                f"{found.images}/{len(entry.rows)}",
                seconds_words(entry.seconds),
            )
        cli_output.out.print(table)


def _plain_table(title: str) -> Table:
    return Table(title=Text(printable(title)), title_justify="left", box=None, pad_edge=False, header_style="dim")


def print_problems(board: Leaderboard, problems: Sequence[Problem]) -> bool:
    """What failed, on stderr; whether anything did."""
    from ..evaluation.leaderboard_report import failure_words

    lines = [f"{problem.metric} on {problem.dataset}: not run: {problem.reason}" for problem in problems]
    named = {(problem.metric, problem.dataset) for problem in problems}
    for entry in board.entries:
        if (entry.metric, entry.dataset) not in named:
            lines += [f"{words} ({entry.dataset})" for words in failure_words(entry)]
    for line in lines:
        say(("failed ", "red"), printable(line))
    return bool(lines)


def print_published(differences: Sequence[PublishedDifference]) -> bool:
    """Published figures beside ours; whether all agree."""
    from ..evaluation.number_format import number
    from ..evaluation.published import SOURCE, TOLERANCE

    if not differences:
        raise InputError(
            "--check-published compares qscorer, qscorer_8bit or qscorer_4bit on koniq10k, spaq, kadid10k, livec, "
            "agiqa3k or csiq, and this output has none of these; an own CSV file can be called so with agiqa3k=FILE.csv"
        )
    table = _plain_table(f"Published figures ({SOURCE}); agrees: within {TOLERANCE}")
    for name in ("metric", "dataset", "measure", "published", "here", "difference", "images", ""):
        table.add_column(name, justify="left" if name in ("metric", "dataset", "measure", "") else "right")
    for one in differences:
        difference = "–" if one.difference is None else f"{one.difference:+.4f}"  # noqa: RUF001
        verdict = Text("agrees", "green") if one.agrees else Text("differs", "red")
        cells = [one.metric, one.dataset, one.measure, f"{one.published:.3f}", number(one.here, 4), difference]
        table.add_row(*(Text(printable(cell)) for cell in cells), str(one.images), verdict)
    cli_output.out.print(table)
    return all(one.agrees for one in differences)
