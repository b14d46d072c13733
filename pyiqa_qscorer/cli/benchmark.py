"""Command `pyiqa-qscorer benchmark`: argument parsing and printing only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import InputError
from . import console as cli_output
from .benchmark_output import print_leaderboard, print_problems, print_published
from .console import clean_errors, count, printable, require, say

if TYPE_CHECKING:
    from ..evaluation.datasets import DatasetSpec
    from ..evaluation.runner import MetricSpec, Problem

DATA, MODEL = "Data", "Metrics"


class ListCommand(TyperCommand):
    """Takes several values after one `-m` or `-d`, as pyiqa's own benchmark script does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))


def spread(arguments: Sequence[str]) -> list[str]:
    """`-m a b` -> `-m a -m b`: a value that follows one of the list options without a flag of its own gets that."""
    flags = {"-m": "--metric", "--metric": "--metric", "-d": "--dataset", "--dataset": "--dataset"}
    found: list[str] = []
    current: str | None = None
    first = False  # the value right behind a flag
    for argument in arguments:
        if argument.startswith("-"):
            current, first = flags.get(argument), True
            found.append(argument)
        else:
            found += [argument] if current is None or first else [current, argument]
            first = False
    return found


def benchmark(
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "-m",
            metavar="NAME...",
            help="metrics of pyiqa, ours among them; LABEL=NAME calls one otherwise",
            rich_help_panel=MODEL,
        ),
    ] = None,
    datasets: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            "-d",
            metavar="NAME|CSV...",
            help="datasets of pyiqa, or CSV files of your own; LABEL=NAME calls one otherwise",
            rich_help_panel=DATA,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="METRIC.OPTION=VALUE",
            help="an option of a metric, e.g. qscorer.checkpoint=DIR; repeatable",
            rich_help_panel=MODEL,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="scores and reports; a later run goes on with it")
    ] = Path("benchmark"),
    data_root: Annotated[
        Path, typer.Option(metavar="DIR", help="folder of pyiqa's datasets", rich_help_panel=DATA)
    ] = Path("datasets"),
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="images of the CSV files; default beside them", rich_help_panel=DATA),
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="reference images; default as --images", rich_help_panel=DATA),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=COLUMN",
            help="column of a CSV file for file, mos, std, reference or split; repeatable",
            rich_help_panel=DATA,
        ),
    ] = None,
    dmos: Annotated[
        bool, typer.Option("--dmos", help="opinions in the CSV files: lower is better", rich_help_panel=DATA)
    ] = False,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME|N", help="split of pyiqa's datasets: column or number", rich_help_panel=DATA),
    ] = None,
    phase: Annotated[
        str | None, typer.Option(metavar="NAME", help="part of the split: test, val, train", rich_help_panel=DATA)
    ] = None,
    original_size: Annotated[
        bool,
        typer.Option(
            "--original-size",
            help="leave out the resizing of pyiqa's dataset options (spaq to 448)",
            rich_help_panel=DATA,
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ...", show_default="cuda if there, else cpu"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="images per pass; 1 as pyiqa's benchmark")] = 1,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="threads that read images")] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="score again what was scored before")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="write the reports of --output anew, score nothing")
    ] = False,
    thumbnails: Annotated[
        bool, typer.Option("--thumbnails/--no-thumbnails", help="small copies of images in the HTML page")
    ] = True,
    check_published: Annotated[
        bool,
        typer.Option("--check-published", help="qscorer beside its published figures; exit code 1 if they differ"),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Compare metrics with human opinions on datasets: a leaderboard.

    Scores go image by image into tables in --output; repeat the command after
    an interruption, or with more metrics: nothing is scored twice. Then
    leaderboard.csv (pyiqa's form), .md, .json and report.html. Several GPUs:
    accelerate launch -m pyiqa_qscorer.cli.app benchmark ... Exit code 0: all
    scored, 1: something failed, 2: it could not start.

    [bold]Examples[/bold]
    $ pyiqa-qscorer benchmark -m qscorer piqe -d koniq10k livec --data-root DIR
    $ pyiqa-qscorer benchmark -m ssim vif -d my.csv --images DIR --dmos
    """
    with clean_errors(debug):
        require("benchmark", "scipy", "matplotlib", "jinja2", "accelerate")
        from ..evaluation.leaderboard_report import write_reports
        from ..evaluation.processes import processes as started
        from ..evaluation.published import check_published as differences
        from ..evaluation.results import read_leaderboard

        problems: list[Problem] = []
        group = None
        if not report_only:
            specs = metric_specs(metrics or [], settings or [])
            wanted = dataset_specs(datasets or [], images, references, columns or [], dmos)
            wanted = with_split(wanted, split, phase, original_size)
            group = started(device)
            problems = score(specs, wanted, output, data_root, group, batch_size, workers, overwrite)
            group.finish()
        if group is not None and group.index:
            raise typer.Exit(0)
        board = read_leaderboard(output)
        for path in write_reports(board, output, thumbnails):
            say(f"{path}", style="dim")
        print_leaderboard(board)
        failed = print_problems(board, problems)
        if check_published:
            failed |= not print_published(differences(board.entries))
    raise typer.Exit(1 if failed else 0)


def score(
    specs: list[MetricSpec],
    wanted: list[DatasetSpec],
    output: Path,
    data_root: Path,
    group: Any,
    batch_size: int,
    workers: int,
    overwrite: bool,
) -> list[Problem]:
    """Read the datasets and run the benchmark; one progress bar per metric and dataset."""
    from ..evaluation.datasets import open_dataset
    from ..evaluation.runner import run_benchmark
    from ..host.pyiqa_datasets import pyiqa_dataset
    from ..host.pyiqa_metrics import PyiqaMetrics

    available = PyiqaMetrics()
    for spec in specs:
        available.describe(spec.name)  # an unknown name is said before anything is read
    opened = [open_dataset(spec, data_root, pyiqa_dataset) for spec in wanted]
    try:
        return run_benchmark(
            specs,
            opened,
            output,
            available,
            group,
            batch_size=batch_size,
            workers=workers,
            overwrite=overwrite,
            progress=_progress,
        )
    except KeyboardInterrupt:
        say(("Interrupted. ", "bold yellow"), f"What was scored is kept in {output}: repeat the command to go on.")
        raise typer.Exit(130) from None


@contextmanager
def _progress(metric: str, dataset: str, images: int, before: int) -> Iterator[Callable[[Any], None]]:
    done = f", {before:,} scored before" if before else ""
    say(f"{metric} on {dataset}: {count(images, 'image')} to score{done}", style="dim")
    with cli_output.progress_bar(images) as advance:
        yield advance


# --- what the user typed ----------------------------------------------------------------------------------------------


def metric_specs(names: Sequence[str], settings: Sequence[str]) -> list[MetricSpec]:
    """`[LABEL=]NAME` and `LABEL.OPTION=VALUE` as metrics with options."""
    from ..evaluation.runner import MetricSpec

    if not names:
        raise InputError("no metric: give some with -m, e.g. -m qscorer piqe ssim")
    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        place, equals, value = setting.partition("=")
        label, dot, option = place.partition(".")
        if not (equals and dot and option):
            raise InputError(f"--set takes METRIC.OPTION=VALUE, got {setting!r}")
        options.setdefault(label, {})[option.replace("-", "_")] = _value(value)
    specs = []
    for label, name in map(_labelled, names):
        specs.append(MetricSpec(label, name, options.pop(label, {})))
    if options:
        raise InputError(f"--set is for {', '.join(sorted(options))}, which -m does not name")
    return specs


def dataset_specs(
    names: Sequence[str], images: Path | None, references: Path | None, columns: Sequence[str], dmos: bool
) -> list[DatasetSpec]:
    """`[LABEL=]NAME` or `[LABEL=]FILE.csv` as datasets; the folders and columns are for the CSV files."""
    from ..evaluation.datasets import DatasetSpec

    if not names:
        raise InputError("no dataset: give some with -d, e.g. -d koniq10k, or a CSV file of your own")
    roles = {}
    for column in columns:
        role, equals, name = column.partition("=")
        if not equals:
            raise InputError(f"--columns takes ROLE=COLUMN, got {column!r}")
        roles[role] = name
    specs = []
    for label, name in map(_labelled, names):
        if name.lower().endswith(".csv"):
            label = Path(name).stem if label == name else label
            specs.append(
                DatasetSpec(
                    label,
                    csv=Path(name),
                    images=images,
                    references=references,
                    columns=roles,
                    lower_better=dmos,
                )
            )
        else:
            specs.append(DatasetSpec(label, name=name))
    if (images or references or roles or dmos) and not any(spec.csv for spec in specs):
        raise InputError("--images, --references, --columns and --dmos are for CSV files, but -d names none")
    return specs


def with_split(
    specs: Sequence[DatasetSpec], split: str | None, phase: str | None, original_size: bool
) -> list[DatasetSpec]:
    """The datasets with what the common options say of them.

    To a CSV file `split` says nothing, and `phase` only with a split column. That is an error where all datasets are
    CSV files, and said where others can use it.
    """
    from dataclasses import replace

    number = int(split) if split is not None and split.isdigit() else split
    found = []
    for spec in specs:
        unused = {}
        if spec.csv is not None and split is not None:
            unused[f"--split {split}"] = "is for pyiqa's datasets: give --columns split=COLUMN and --phase NAME"
        if spec.csv is not None and phase is not None and "split" not in spec.columns:
            unused[f"--phase {phase}"] = "needs --columns split=COLUMN"
        for flag, reason in unused.items():
            if all(other.csv is not None for other in specs):
                raise InputError(f"{flag} {reason} for {spec.csv}")
            say(("warning: ", "yellow"), printable(f"{flag} is not used for {spec.label}: it {reason}"))
        own_phase = None if f"--phase {phase}" in unused else phase
        found.append(replace(spec, split=number, phase=own_phase, original_size=original_size))
    return found


def _labelled(text: str) -> tuple[str, str]:
    label, equals, name = text.partition("=")
    return (label, name) if equals else (text, text)


def _value(text: str) -> Any:
    """true, false, numbers and null as such, everything else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
