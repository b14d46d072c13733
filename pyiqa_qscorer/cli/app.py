"""Command line `pyiqa-qscorer`: argument parsing and printing only.

Exit codes: 0 all well, 1 some images failed (or `doctor` found a problem), 2 wrong usage or a setup
that cannot work, 70 an error of this program, with its traceback, 130 interrupted. What is heavy
(torch) is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import InputError
from ..registry import PUBLISHED_METRIC, default_metric, resolve_metric_options
from . import console as cli_output
from .benchmark import benchmark
from .console import clean_errors, count, say
from .doctor import print_report
from .error_analysis import errors
from .options import (
    AttnImplementation,
    Base,
    BaseRevision,
    CacheDir,
    Checkpoint,
    Clamp,
    Compile,
    Debug,
    Dtype,
    LocalFilesOnly,
    Metric,
    Prompt,
    Revision,
    ScoreMetric,
    option,
)
from .render import render
from .train import train

if TYPE_CHECKING:
    from ..data.score_store import ScoreRow

app = typer.Typer(
    name="pyiqa-qscorer",
    help="Q-Scorer image quality metrics: scores from 0 to 5, higher is better.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point `pyiqa-qscorer`."""
    try:
        app()
    except Exception:  # Python would end with 1, which means that some images failed
        traceback.print_exc()
        sys.exit(70)


class SavedLayout(str, Enum):
    """Checkpoint layouts that `merge` writes."""

    QSCORER = "qscorer"
    PUBLISHED = "published"


def _show_version(asked: bool) -> None:
    if asked:
        print(f"pyiqa-qscorer {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        option("show the version and exit", "--version", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


# --- score --------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def score(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="image files, folders (searched in all depths), patterns such as 'a/**/*.png'",
            metavar="INPUT",
            show_default=False,
        ),
    ],
    metric: ScoreMetric = None,
    output: Annotated[
        Path | None,
        option("write a table: .csv, .jsonl or .parquet", "--output", "-o", metavar="FILE", show_default=False),
    ] = None,
    resume: Annotated[bool, option("go on from an interrupted or finished --output", "--resume")] = False,
    overwrite: Annotated[bool, option("replace an existing --output", "--overwrite")] = False,
    device: Annotated[
        str | None,
        option("cpu, cuda, cuda:1, ...", metavar="DEVICE", show_default="cuda if there, else cpu"),
    ] = None,
    batch_size: Annotated[int, option("images per pass of the model", min=1, metavar="N")] = 16,
    workers: Annotated[
        int | None,
        option(
            "threads that read images",
            min=1,
            metavar="N",
            show_default="one per core, at most 16",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    base: Base = None,
    revision: Revision = None,
    base_revision: BaseRevision = None,
    dtype: Dtype = None,
    prompt: Prompt = None,
    clamp: Clamp = None,
    attn_implementation: AttnImplementation = None,
    compile: Compile = False,
    local_files_only: LocalFilesOnly = False,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Score images.

    Without --output: a table, best first, in a terminal; in a pipe lines
    "score TAB path". Exit code 0 if all images were scored, 1 if some failed,
    2 if it could not start.

    [bold]Examples[/bold]
    $ pyiqa-qscorer score photo.jpg holiday/
    $ pyiqa-qscorer score 'data/**/*.png' -o scores.csv --resume
    $ pyiqa-qscorer score photos/ | sort -rn | head
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
        "compile": compile or None,
        "local_files_only": local_files_only or None,
        "cache_dir": cache_dir,
    }
    with clean_errors(debug):
        from ..data.find_images import find_images
        from ..data.score_store import ScoreTable
        from ..files import file_key
        from ..scorer import score_files

        metric = metric or default_metric(checkpoint)
        # What can be wrong with the command itself comes before torch and the model.
        resolve_metric_options(metric, options)
        if output is None and (resume or overwrite):
            raise InputError("--resume and --overwrite go with --output")
        table: ScoreTable[ScoreRow] | None = None if output is None else ScoreTable(output, resume, overwrite)
        found = find_images(inputs)
        if found.repeated:
            say(f"{count(found.repeated, 'image')} named twice: scored once", style="dim")

        from ..scorer import Scorer

        say(f"Loading {metric}{f' from {checkpoint}' if checkpoint else ''} ...", style="dim")
        scorer = Scorer(metric, device, batch_size, workers, **options)
        todo = found.paths
        if table is not None:
            todo = table.open(scorer.name, scorer.identity).unfinished(found.paths)
            if done := len(found.paths) - len(todo):
                say(f"{count(done, 'image')} of {len(found.paths):,} scored before", style="dim")
        rows: list[ScoreRow] = []
        started = time.monotonic()
        try:
            with cli_output.progress_bar(len(todo)) as advance:
                for row in score_files(scorer, todo, table):
                    rows.append(row)
                    advance(row)
                    if table is None and not cli_output.out.is_terminal:
                        cli_output.print_line(row)
            if table is not None:
                table.finish(found.paths)
        except KeyboardInterrupt:
            kept = None if table is None else table.partial
            cli_output.print_interrupted(len(rows), len(todo), kept)
            raise typer.Exit(130) from None
        finally:
            if table is not None:
                table.close()
        timing = (len(rows), time.monotonic() - started)
        if table is not None:
            rows = [table.rows[file_key(path)] for path in found.paths]
        elif cli_output.out.is_terminal:
            cli_output.print_table(rows)
        cli_output.print_summary(rows, *timing, output)
    raise typer.Exit(1 if any(row.score is None for row in rows) else 0)


app.command(no_args_is_help=True)(benchmark)
app.command(no_args_is_help=True)(errors)
app.command(no_args_is_help=True)(train)
app.command(no_args_is_help=True)(render)


# --- download, merge, doctor --------------------------------------------------------------------


@app.command()
def download(
    metric: Metric = PUBLISHED_METRIC,
    checkpoint: Checkpoint = None,
    base: Base = None,
    revision: Revision = None,
    base_revision: BaseRevision = None,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Fetch the weights of a metric, or complete an interrupted download.

    Prints the folders, one per line. HF_HOME, HF_ENDPOINT and HF_TOKEN work
    as with every tool for the Hugging Face Hub.

    [bold]Examples[/bold]
    $ pyiqa-qscorer download
    $ pyiqa-qscorer download --cache-dir /big/disk
    """
    with clean_errors(debug):
        source = _source(metric, checkpoint, base, revision, base_revision, False, cache_dir)

        from ..checkpoints import CheckpointSource

        where = CheckpointSource(**source)
        cli_output.print_plan(where.plan())
        for folder in where.fetch():
            cli_output.print_folder(folder)


@app.command(no_args_is_help=True)
def merge(
    output: Annotated[
        Path,
        option("new or empty folder", "--output", "-o", metavar="DIR"),
    ],
    layout: Annotated[
        SavedLayout, option("for this package, or for the published code", metavar="qscorer|published")
    ] = SavedLayout.QSCORER,
    dtype: Annotated[str, option("precision to write: float16, bfloat16 or float32", metavar="TYPE")] = "float16",
    metric: Metric = PUBLISHED_METRIC,
    checkpoint: Checkpoint = None,
    base: Base = None,
    revision: Revision = None,
    base_revision: BaseRevision = None,
    local_files_only: LocalFilesOnly = False,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Write a LoRA checkpoint and its base as one folder.

    It loads faster and needs no base.

    [bold]Example[/bold]
    $ pyiqa-qscorer merge -o merged/
    $ pyiqa-qscorer score photo.jpg --checkpoint merged/
    """
    with clean_errors(debug):
        source = _source(metric, checkpoint, base, revision, base_revision, local_files_only, cache_dir)

        from ..checkpoints import CheckpointSource, merge_checkpoint

        written: dict[str, Any] = {"layout": layout.value, "dtype": dtype}
        say(f"Merging {source['checkpoint']} ...", style="dim")
        folder = merge_checkpoint(output, CheckpointSource(**source), **written)
        cli_output.print_folder(folder)


@app.command()
def doctor(
    as_json: Annotated[bool, option("print the facts as JSON", "--json")] = False,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Show versions, devices, memory, downloads, and which metric can run here.

    Asks no server. Exit code 1 if something is wrong with the installation.
    """
    with clean_errors(debug):
        from .doctor_facts import examine

        report = examine(cache_dir)
        if as_json:
            print(json.dumps(report.as_dict(), indent=2))
        else:
            print_report(report)
    raise typer.Exit(1 if report.problems else 0)


def _source(
    metric: str,
    checkpoint: str | None,
    base: str | None,
    revision: str | None,
    base_revision: str | None,
    local_files_only: bool,
    cache_dir: str | None,
) -> dict[str, Any]:
    """What says where the weights are: those of the metric, unless given otherwise."""
    given = {
        "checkpoint": checkpoint,
        "base": base,
        "revision": revision,
        "base_revision": base_revision,
        "local_files_only": local_files_only,
        "cache_dir": cache_dir,
    }
    options = resolve_metric_options(metric, given)
    return {name: options[name] for name in given if name in options}
