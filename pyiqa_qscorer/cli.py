"""Command line `pyiqa-qscorer`: argument parsing and printing only.

Exit codes: 0 all well, 1 some images failed (or `doctor` found a problem), 2 wrong usage or a setup
that cannot work, 130 interrupted. What is heavy (torch) is imported inside the commands, so that
`--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pyiqa_qscorer import __version__
from pyiqa_qscorer.errors import QScorerError
from pyiqa_qscorer.names import METRICS, OPTIONS, SCORE_RANGE, resolve_metric_options

if TYPE_CHECKING:
    from pyiqa_qscorer.score_files import ScoreRow

MAX_LISTED_FAILURES = 20  # with --output, whose error column has them all
BAR_WIDTH = 16

app = typer.Typer(
    name="pyiqa-qscorer",
    help="Q-Scorer image quality metrics: scores from 0 to 5, higher is better.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def main() -> None:
    """Entry point `pyiqa-qscorer`."""
    app()


# --- options that several commands share, spelled as in `create_metric` and `Scorer` -------------

_MODEL = "Model"
MetricOption = Annotated[
    str,
    typer.Option("--metric", "-m", help=f"One of {', '.join(METRICS)}.", rich_help_panel=_MODEL),
]


def _model_option(name: str, *flags: str) -> Any:
    return typer.Option(
        *flags, help=OPTIONS[name], rich_help_panel=_MODEL, show_default=False, metavar=None
    )


Checkpoint = Annotated[str | None, _model_option("checkpoint")]
Base = Annotated[str | None, _model_option("base")]
Revision = Annotated[str | None, _model_option("revision")]
BaseRevision = Annotated[str | None, _model_option("base_revision")]
CacheDir = Annotated[str | None, _model_option("cache_dir")]
LocalFilesOnly = Annotated[bool, _model_option("local_files_only", "--local-files-only")]
Dtype = Annotated[str | None, _model_option("dtype")]
Prompt = Annotated[str | None, _model_option("prompt")]
Clamp = Annotated[bool | None, _model_option("clamp", "--clamp/--no-clamp")]
AttnImplementation = Annotated[str | None, _model_option("attn_implementation")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _show_version(asked: bool) -> None:
    if asked:
        out.print(f"pyiqa-qscorer {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


# --- score --------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def score(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders (searched in all depths) and patterns such as 'a/**/*.png'.",
            show_default=False,
        ),
    ],
    metric: MetricOption = "qscorer",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write a table: FILE.csv, FILE.jsonl or FILE.parquet.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from an interrupted or finished --output."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing --output.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, ...  [default: cuda if there]", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per pass of the model.")] = 16,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Threads that read images.  [default: one per core, at most 16]"),
    ] = None,
    checkpoint: Checkpoint = None,
    base: Base = None,
    revision: Revision = None,
    base_revision: BaseRevision = None,
    dtype: Dtype = None,
    prompt: Prompt = None,
    clamp: Clamp = None,
    attn_implementation: AttnImplementation = None,
    local_files_only: LocalFilesOnly = False,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Score images.

    Without --output: a table, best first, in a terminal; lines "score TAB path" in a pipe.
    Exit code 0 if every image was scored, 1 if some failed, 2 if it could not start.

    [bold]Examples[/bold]

      pyiqa-qscorer score photo.jpg holiday/

      pyiqa-qscorer score 'data/**/*.png' -o scores.csv --resume

      pyiqa-qscorer score photos/ | sort -rn | head
    """
    options = {
        "checkpoint": checkpoint,
        "base": base,
        "revision": revision,
        "base_revision": base_revision,
        "dtype": dtype,
        "prompt": prompt,
        "clamp": clamp,
        "attn_implementation": attn_implementation,
        "local_files_only": local_files_only or None,
        "cache_dir": cache_dir,
    }
    with _clean_errors(debug):
        from pyiqa_qscorer.score_files import InputError, file_key, find_images, score_files
        from pyiqa_qscorer.score_table import ScoreTable

        # All that can be wrong with the command itself comes before torch and the model.
        resolve_metric_options(metric, options)
        if output is None and (resume or overwrite):
            raise InputError("--resume and --overwrite go with --output")
        table = None if output is None else ScoreTable(output, resume, overwrite)
        found = find_images(inputs)
        if found.repeated:
            err.print(f"[dim]{_count(found.repeated, 'repeated path')} left out[/dim]")

        from pyiqa_qscorer.scoring import Scorer

        err.print(f"[dim]Loading {metric} ...[/dim]", soft_wrap=True)
        scorer = Scorer(metric, device, batch_size, workers, **options)
        todo = found.paths
        if table is not None:
            table.open(scorer.name, scorer.identity)
            todo = table.unfinished(found.paths)
            if len(todo) < len(found.paths):
                err.print(
                    f"{len(found.paths) - len(todo):,} of {len(found.paths):,} images are scored already"
                )
        rows: list[ScoreRow] = []
        started = time.monotonic()
        try:
            with _progress(len(todo)) as advance:
                for row in score_files(scorer, todo, table):
                    rows.append(row)
                    advance(row)
                    if table is None and not out.is_terminal and row.score is not None:
                        _print_line(row)
            seconds = time.monotonic() - started
            if table is not None:
                table.finish(found.paths)
        except KeyboardInterrupt:
            _print_interrupted(len(rows), len(todo), table.partial if table else None)
            raise typer.Exit(130) from None
        finally:
            if table is not None:
                table.close()
    made = len(rows)
    if table is not None:
        rows = [table.rows[file_key(path)] for path in found.paths]
    elif out.is_terminal:
        _print_table(rows)
    _print_summary(rows, made, seconds, output)
    raise typer.Exit(1 if any(row.score is None for row in rows) else 0)


def _print_line(row: ScoreRow) -> None:
    # As bytes, since a file name need not be UTF-8.
    sys.stdout.buffer.write(os.fsencode(f"{row.score:.6f}\t{row.path}\n"))
    sys.stdout.buffer.flush()


def _print_table(rows: Sequence[ScoreRow]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column(f"{SCORE_RANGE[0]:g} to {SCORE_RANGE[1]:g}", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True, style="dim")
    table.add_column("image", overflow="fold")
    for row in sorted(rows, key=lambda row: -1.0 if row.score is None else row.score, reverse=True):
        if row.score is not None:
            style = _style(row.score)
            table.add_row(
                Text(f"{row.score:.3f}", style=f"bold {style}"),
                Text(_bar(row.score), style=style),
                f"{row.width}x{row.height}",
                Text(_printable(row.path)),
            )
    if table.row_count:
        out.print(table)


def _bar(score: float) -> str:
    low, high = SCORE_RANGE
    eighths = round(8 * BAR_WIDTH * min(max((score - low) / (high - low), 0.0), 1.0))
    if not out.encoding.startswith("utf"):
        return "#" * round(eighths / 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _style(score: float) -> str:
    low, high = SCORE_RANGE
    part = (score - low) / (high - low)
    return "green" if part >= 0.6 else "yellow" if part >= 0.4 else "red"


def _print_summary(
    rows: Sequence[ScoreRow], made: int, seconds: float, output: Path | None
) -> None:
    scored = [row for row in rows if row.score is not None]
    failed = [row for row in rows if row.score is None]
    for row in failed[: MAX_LISTED_FAILURES if output else None]:
        line = Text.assemble(
            ("failed ", "bold red"),
            (_printable(row.path), "bold"),
            f": {_printable(str(row.error))}",
        )
        err.print(line, soft_wrap=True)
    if output and len(failed) > MAX_LISTED_FAILURES:
        err.print(
            f"       and {len(failed) - MAX_LISTED_FAILURES:,} more: see 'error' in the table"
        )
    parts = [f"[bold]{_count(len(scored), 'image')} scored[/bold]"]
    if failed:
        parts.append(f"[bold red]{len(failed):,} failed[/bold red]")
    if scored:
        values = sorted(row.score for row in scored if row.score is not None)
        parts.append(f"mean {sum(values) / len(values):.3f}")
        if len(values) > 1:
            parts.append(f"from {values[0]:.3f} to {values[-1]:.3f}")
    if made:
        parts.append(f"{_duration(seconds)}, {_rate(made, seconds)}")
    err.print(", ".join(parts), soft_wrap=True)
    if output:
        err.print(Text.assemble("Table: ", (str(output), "bold")), soft_wrap=True)


def _print_interrupted(made: int, wanted: int, partial: Path | None) -> None:
    err.print(
        f"\n[bold yellow]Interrupted[/bold yellow] after {made:,} of {_count(wanted, 'image')}."
    )
    if partial is not None and made:
        err.print(
            Text(f"They are kept in {partial}. Repeat the command with --resume to go on."),
            soft_wrap=True,
        )


# --- printing -----------------------------------------------------------------------------------


@contextmanager
def _clean_errors(debug: bool) -> Iterator[None]:
    """What the package raises on purpose becomes one message and exit code 2."""
    warnings.showwarning = _show_warning
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        yield
    except KeyboardInterrupt:
        err.print("[bold yellow]Interrupted.[/bold yellow]")
        raise typer.Exit(130) from None
    except (QScorerError, ValueError) as error:
        if debug:
            raise
        err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(2) from error


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    err.print(Text.assemble(("warning: ", "yellow"), str(message)), soft_wrap=True)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[ScoreRow], None]]:
    columns = (
        TextColumn("Scoring"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("[dim]{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("[red]{task.fields[failed]}"),
    )
    hidden = not err.is_terminal or total < 2
    with Progress(*columns, console=err, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total, rate="", failed="")
        started, failed = time.monotonic(), 0

        def advance(row: ScoreRow) -> None:
            nonlocal failed
            failed += row.score is None
            done = bar.tasks[0].completed + 1
            bar.update(
                task,
                advance=1,
                rate=_rate(done, time.monotonic() - started),
                failed=f"{failed:,} failed" if failed else "",
            )

        yield advance


def _printable(text: str) -> str:
    """`text` without what could drive the terminal; file names may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _rate(number: float, seconds: float) -> str:
    rate = number / max(seconds, 1e-9)
    return f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
