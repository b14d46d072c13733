"""Command `pyiqa-qscorer score`: argument parsing and printing only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..files import file_key
from . import console as cli_output
from .console import clean_errors, count, printable, require, say, say_loading
from .options import Debug, Device, ScoreMetric, chosen_metric, model_options, option

if TYPE_CHECKING:
    from ..data.score_rows import ScoreRow
    from ..data.score_store import ScoreTable
    from ..scorer import Scorer

LIST = "-"  # stands for a list of inputs on standard input
WORST_IN_DETAIL = 10  # named, and mapped, beside a page or a folder of maps where --worst does not say


@model_options()
def score(
    context: typer.Context,
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="image files, folders (searched in all depths), patterns such as 'a/**/*.png'; "
            "- for a list of them on standard input, one per line or separated by null characters",
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
    worst: Annotated[int | None, option("print the N lowest scores only, lowest first", min=1, metavar="N")] = None,
    report: Annotated[
        Path | None,
        option("write a page to look at: thumbnails from worst to best", metavar="FILE.html", show_default=False),
    ] = None,
    thumbnails: Annotated[bool, option("small copies of images in --report", "--thumbnails/--no-thumbnails")] = True,
    explain: Annotated[
        Path | None,
        option("folder for maps of the --worst images: where in them the quality is low", metavar="DIR"),
    ] = None,
    engine: Annotated[
        str | None,
        option("ray: many processes or machines; --output is then a folder", metavar="NAME", rich_help_panel="Engine"),
    ] = None,
    column: Annotated[
        str | None,
        option("of Parquet files and webdataset shards: the images", metavar="NAME", rich_help_panel="Engine"),
    ] = None,
    actors: Annotated[
        int, option("processes that each load the metric", min=1, metavar="N", rich_help_panel="Engine")
    ] = 1,
    device: Device = None,
    batch_size: Annotated[int, option("images per pass of the model", min=1, metavar="N")] = 16,
    workers: Annotated[
        int | None, option("threads that read images", min=1, metavar="N", show_default="one per core, at most 16")
    ] = None,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Score images.

    Without --output: a table, best first, in a terminal; in a pipe lines
    "score TAB path", with line breaks in a path escaped. Exit code 0 if all
    images were scored, 1 if some failed, 2 if it could not start.

    [bold]Examples[/bold]
    $ pyiqa-qscorer score photo.jpg holiday/
    $ pyiqa-qscorer score 'data/**/*.png' -o scores.csv --resume --worst 10
    $ pyiqa-qscorer score photos/ --report page.html
    $ pyiqa-qscorer score photos/ --worst 5 --explain maps/
    $ pyiqa-qscorer score photos/ | sort -rn | head
    $ find photos -newer list.txt -print0 | pyiqa-qscorer score -
    """
    with clean_errors(debug), ExitStack() as stack:
        # What can be wrong with the command itself comes before torch and the model.
        metric = chosen_metric(metric, options)
        if engine is not None:
            _check_engine(engine, output, context)
            scoring = {"column": column, "concurrency": actors, "batch_size": batch_size}
            _score_on_ray(inputs, output or Path(), metric, device, options, **scoring)
            return
        if output is None and (resume or overwrite):
            raise InputError("--resume and --overwrite go with --output")
        if report is not None and (report.suffix.lower() not in (".html", ".htm") or not report.parent.is_dir()):
            raise InputError(f"--report must be a file .html in a folder that exists, got {report}")
        if report is not None or explain is not None:
            worst = worst or WORST_IN_DETAIL
        from ..data.find_images import find_images
        from ..data.score_store import ScoreTable

        found = find_images(_with_lists(inputs))
        table: ScoreTable[ScoreRow] | None = None
        if output is not None:
            table = stack.enter_context(ScoreTable(output, resume, overwrite))
        if found.repeated:
            say(f"{count(found.repeated, 'image')} named twice: scored once", style="dim")

        from ..scorer import Scorer, score_files

        say_loading(metric, options["checkpoint"])
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
                    if table is None and worst is None and not cli_output.out.is_terminal:
                        cli_output.print_line(row)
            if table is not None:
                table.finish(found.paths)
        except KeyboardInterrupt:
            kept = None if table is None else table.partial
            cli_output.print_interrupted(len(rows), len(todo), kept)
            raise typer.Exit(130) from None
        timing = (sum(row.score is not None for row in rows), time.monotonic() - started)
        if table is not None:
            rows = [table.rows[file_key(path)] for path in found.paths]
        if worst is not None or (table is None and cli_output.out.is_terminal):
            cli_output.print_scores(rows, worst)
        cli_output.print_summary(rows, *timing, output)
        if report is not None:
            from ..data.score_page import write_score_page

            write_score_page(report, rows, thumbnails)
            say("Page: ", (str(report), "bold"))
        if explain is not None:
            _write_maps(scorer, rows, worst or WORST_IN_DETAIL, explain)
    raise typer.Exit(1 if any(row.score is None for row in rows) else 0)


def _check_engine(engine: str, output: Path | None, context: typer.Context) -> None:
    if engine != "ray":
        raise InputError(f"--engine must be ray, or be left out, got {engine!r}")
    if output is None or output.suffix or output.is_file():
        raise InputError(f"--engine ray writes into a folder: give --output DIR, got {output}")
    for name in ("overwrite", "worst", "report", "explain", "workers"):
        if context.params[name]:
            raise InputError(f"--{name} does not go with --engine ray")


def _score_on_ray(
    inputs: list[str], output: Path, metric: str, device: str | None, options: dict[str, Any], **scoring: Any
) -> None:
    require("ray", "ray")
    import logging

    import pyarrow.dataset
    import ray
    from ray.data.aggregate import Count

    from ..ray import score_to_folder

    if not ray.is_initialized():
        # Scoring, reading, writing and Ray's filter of what is done take one logical core each and wait for each other.
        cores = None if os.environ.get("RAY_ADDRESS") else max(os.cpu_count() or 1, scoring["concurrency"] + 4)
        ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs of an error is pages of call stacks
    given = {name: value for name, value in options.items() if value is not None}
    num_gpus = 0 if device == "cpu" or (device is None and not ray.cluster_resources().get("GPU")) else 1
    scored = score_to_folder(_with_lists(inputs), output, metric, metric_options=given, num_gpus=num_gpus, **scoring)
    made = scored.aggregate(Count(on="score", ignore_nulls=True, alias_name="scored"))["scored"]
    failed = scored.count() - made
    if failed:
        broken = pyarrow.dataset.field("error").is_valid()
        rows = pyarrow.dataset.dataset(str(output / "parts")).scanner(filter=broken)
        for row in rows.head(cli_output.MAX_LISTED_FAILURES).to_pylist():
            cli_output.print_failure(row.get("path") or row.get("__key__") or "a row", row["error"])
    say(f"{count(made, 'image')} scored, {failed:,} failed: ", (f"{output}/parts/*.parquet", "bold"))
    raise typer.Exit(1 if failed else 0)


def _write_maps(scorer: Scorer, rows: Iterable[ScoreRow], number: int, folder: Path) -> None:
    """One PNG for each of the worst images, worst first by name."""
    from ..errors import ImageError, OutputError
    from ..images.reading import open_image

    folder.mkdir(parents=True, exist_ok=True)
    scored = sorted((row for row in rows if row.score is not None), key=lambda row: row.score or 0.0)
    for place, row in enumerate(scored[:number], start=1):
        target = folder / f"{place:03d}_{Path(row.path).stem}.png"
        try:
            scorer.explain(row.path).overlay(open_image(row.path)).save(target)
        except ImageError as error:
            say((f"no map: {printable(str(error))}", "yellow"))
        except OSError as error:
            raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    say("Maps: ", (str(folder), "bold"))


def _with_lists(inputs: Iterable[str]) -> Iterator[str]:
    """The inputs, with the names on standard input in place of `LIST`."""
    for given in inputs:
        if given != LIST:
            yield given
            continue
        content = sys.stdin.buffer.read()  # as bytes, since a file name need not be UTF-8
        names = content.split(b"\0") if b"\0" in content else (line.rstrip(b"\r") for line in content.split(b"\n"))
        yield from (os.fsdecode(name) for name in names if name)
