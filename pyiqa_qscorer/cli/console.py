"""What the command line prints. Results go to stdout, all else to stderr."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..errors import OutputError, QScorerError
from ..files import readable_size
from ..registry import SCORE_RANGE
from ..report import printable

if TYPE_CHECKING:
    from ..checkpoints.hub import DownloadPlan
    from ..data.score_rows import ScoreRow
    from ..training.run import TrainingResult

MAX_LISTED_FAILURES = 20  # in a terminal, or beside a table on disk, whose error column has them all
LONG_TABLE = 100  # rows
BAR_WIDTH = 20
LINE_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def _use_stderr_for_notices() -> None:
    """Warnings and log messages as one plain line each, above a progress bar."""
    warnings.showwarning = _show_warning
    logging.basicConfig(handlers=[_StderrHandler()], format="%(message)s")
    # Says at every start that it found no extra kernels for the CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def say(*parts: str | tuple[str, str], style: str = "") -> None:
    """One message on stderr; `parts` as for `rich.text.Text.assemble`, never read as markup."""
    err.print(Text.assemble(*parts, style=style), soft_wrap=True)


def say_loading(metric: str, checkpoint: str | None) -> None:
    """That a metric is being loaded, which may take minutes."""
    say(f"Loading {metric}{f' from {checkpoint}' if checkpoint else ''} ...", style="dim")


@contextmanager
def clean_errors(debug: bool) -> Iterator[None]:
    """What the package raises on purpose, and what the system refuses, becomes one message and exit code 2."""
    _use_stderr_for_notices()
    try:
        yield
        if sys.stdout is not None:
            with writing_stdout():
                sys.stdout.flush()  # Python would do it after the exit code is chosen
    except KeyboardInterrupt:
        say(("Interrupted.", "bold yellow"))
        raise typer.Exit(130) from None
    except (QScorerError, ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        reason = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.strerror}: {error.filename}"  # without the number
        say(("error: ", "bold red"), "\n".join(map(printable, reason.split("\n"))))
        raise typer.Exit(2) from error


@contextmanager
def writing_stdout() -> Iterator[None]:
    """Raises `OutputError` where standard output is full or closed; the rest of it is dropped."""
    if sys.stdout is None:
        raise OutputError("standard output is closed: keep it open, or use --output")
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else it fails again at Python's end
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


def require(extra: str, *modules: str) -> None:
    """Raise `QScorerError` that says what to install where a module that a command needs is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise QScorerError(f'this command needs {", ".join(missing)}: pip install "pyiqa-qscorer[{extra}]"')


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        label = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        say((label, "yellow"), printable(self.format(record)))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(("warning: ", "yellow"), printable(str(message)))


# --- scores -------------------------------------------------------------------------------------


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[ScoreRow], None]]:
    """A bar on stderr, if that is a terminal; call what it yields with every row."""
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
        started, done, failed = time.monotonic(), 0, 0

        def advance(row: ScoreRow) -> None:
            nonlocal done, failed
            done += 1
            failed += row.score is None
            speed = rate(done, time.monotonic() - started)
            note = f"{failed:,} failed" if failed else ""
            bar.update(task, completed=done, rate=speed, failed=note)

        yield advance


def print_line(row: ScoreRow) -> None:
    """A score for a pipe: "score TAB path", line breaks in the path escaped; nothing for a failed image."""
    if row.score is None:
        return
    path = LINE_BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode(), row.path)
    # As bytes, since a file name need not be UTF-8.
    with writing_stdout():
        sys.stdout.buffer.write(os.fsencode(f"{row.score:.6f}\t{path}\n"))
        sys.stdout.buffer.flush()


def print_scores(rows: Sequence[ScoreRow], worst: int | None = None) -> None:
    """Scores, best first, or the `worst` lowest, lowest first: a table in a terminal, else lines."""
    scored = [(row.score, row) for row in rows if row.score is not None]
    scored = sorted(scored, key=lambda pair: pair[0], reverse=worst is None)[:worst]
    if not out.is_terminal:
        for _, row in scored:
            print_line(row)
        return
    low, high = SCORE_RANGE
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column(f"{low:g}{high:>{BAR_WIDTH - 1}g}", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True, style="dim")
    table.add_column("image", overflow="fold")
    for score, row in scored:
        part = (score - low) / (high - low)
        style = "green" if part >= 0.6 else "yellow" if part >= 0.4 else "red"
        size, path = f"{row.width}x{row.height}", Text(printable(row.path))
        bar = ProgressBar(1, part, BAR_WIDTH, complete_style=style, finished_style=style)
        table.add_row(Text(f"{score:.3f}", style=f"bold {style}"), bar, size, path)
    if scored:
        out.print(table)
    if len(scored) > LONG_TABLE:
        say("--worst N shows the lowest scores only", style="dim")


def print_failure(name: str, reason: str) -> None:
    say(("failed ", "bold red"), (printable(name), "bold"), f": {printable(reason)}")


def print_summary(rows: Sequence[ScoreRow], made: int, seconds: float, output: Path | None) -> None:
    """Failed images with their reasons, figures, and where the table is; this run `made` so many in `seconds`."""
    failed = [row for row in rows if row.score is None]
    listed = failed[: MAX_LISTED_FAILURES if output or err.is_terminal else None]
    for row in listed:
        print_failure(row.path, str(row.error))
    if more := len(failed) - len(listed):
        say(f"and {more:,} more: column 'error' of {'the table' if output else 'a table (--output)'} has all")
    values = sorted(row.score for row in rows if row.score is not None)
    parts: list[str | tuple[str, str]] = [(f"{count(len(values), 'image')} scored", "bold")]
    if failed:
        parts += [", ", (f"{len(failed):,} failed", "bold red")]
    if values:
        parts.append(f", mean {sum(values) / len(values):.3f}")
    if len(values) > 1:
        parts.append(f" ({values[0]:.3f} to {values[-1]:.3f})")
    if made:
        parts.append(f", {duration(seconds)}, {rate(made, seconds)}")
    say(*parts)
    if output:
        say("Table: ", (printable(str(output)), "bold"))


def print_interrupted(made: int, wanted: int, partial: Path | None) -> None:
    """After Ctrl-C: what is kept, and how to go on."""
    say(("Interrupted", "bold yellow"), f" after {made:,} of {count(wanted, 'image')}.")
    if partial is not None and made:
        say(f"They are kept in {printable(str(partial))}. Repeat the command with --resume to go on.")


# --- checkpoints --------------------------------------------------------------------------------


def print_plan(plan: Sequence[Path | DownloadPlan]) -> None:
    """Before a download: what is there, what is missing, where it goes."""
    for part in plan:
        if isinstance(part, Path):
            say((str(part), "bold"), ": a local folder")
            continue
        size, missing = readable_size(sum(file.size or 0 for file in part.files)), part.missing_bytes
        state = f"{readable_size(missing)} of {size} to download" if missing else f"complete, {size}"
        say((part.repo_id, "bold"), f": {state}")


def print_folder(folder: Path) -> None:
    """A folder on stdout, for scripts; its size on stderr."""
    print(folder, flush=True)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    say(readable_size(size), style="dim")


# --- training ---------------------------------------------------------------------------------------


def print_training(result: TrainingResult) -> None:
    """Where the checkpoints are, and how well the model predicts the validation data."""
    if not result.finished:
        say(("Stopped by a signal; repeat the command to go on.", "bold yellow"))
        return
    measured = {name.removeprefix("validation_"): value for name, value in result.metrics.items()}
    shown = [f"{name.upper()} {measured[name]:.4f}" for name in ("srcc", "plcc", "krcc", "rmse") if name in measured]
    if shown:
        say("Validation: " + ", ".join(shown))
    for folder in result.folders.values():
        print_folder(folder)


# --- words --------------------------------------------------------------------------------------


def checkpoint_name(place: str) -> str:
    """Short name of a checkpoint; of `run/checkpoint_qscorer`, as training leaves it, that of the run."""
    *_, parent, name = ("", *Path(place).parts)
    return parent if name.startswith("checkpoint_") and parent else name


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def rate(number: float, seconds: float) -> str:
    per_second = number / max(seconds, 1e-9)
    return f"{per_second:,.0f} images/s" if per_second >= 10 else f"{per_second:.2g} images/s"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
