"""Command `pyiqa-qscorer benchmark`: argument parsing and printing only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from . import console as cli_output
from .console import clean_errors, count, printable, require, say
from .options import Debug, Device, option

if TYPE_CHECKING:
    from ..evaluation.datasets import DatasetSpec
    from ..evaluation.published import PublishedDifference
    from ..evaluation.results import Leaderboard
    from ..evaluation.runner import MetricSpec, Problem

model, data = (partial(option, rich_help_panel=panel) for panel in ("Metrics", "Data"))


def benchmark(
    metrics: Annotated[
        list[str] | None, model("of pyiqa; repeatable; LABEL=NAME renames it", "--metric", "-m", metavar="NAME")
    ] = None,
    datasets: Annotated[
        list[str] | None,
        data("dataset of pyiqa or CSV file; repeatable; LABEL=NAME", "--dataset", "-d", metavar="NAME|CSV"),
    ] = None,
    settings: Annotated[
        list[str] | None, model("e.g. qscorer.checkpoint=DIR; repeatable", "--set", metavar="METRIC.OPTION=VALUE")
    ] = None,
    output: Annotated[
        Path, option("scores and reports; a later run goes on with it", "--output", "-o", metavar="DIR")
    ] = Path("benchmark"),
    data_root: Annotated[Path, data("folder of pyiqa's datasets", metavar="DIR")] = Path("datasets"),
    images: Annotated[Path | None, data("images of the CSV files; else beside them", metavar="DIR")] = None,
    references: Annotated[Path | None, data("reference images; default as --images", metavar="DIR")] = None,
    columns: Annotated[
        list[str] | None, data("column of a CSV file for file, mos, std, reference or split", metavar="ROLE=COLUMN")
    ] = None,
    dmos: Annotated[bool, data("opinions in the CSV files: lower is better", "--dmos")] = False,
    split: Annotated[str | None, data("split of pyiqa's datasets by name or number", metavar="NAME|N")] = None,
    phase: Annotated[str | None, data("part of the split: test, val, train", metavar="NAME")] = None,
    original_size: Annotated[
        bool, data("leave out the resizing of pyiqa's dataset options (spaq to 448)", "--original-size")
    ] = False,
    device: Device = None,
    batch_size: Annotated[int, option("images per pass, of our metrics only", min=1, metavar="N")] = 1,
    workers: Annotated[int, option("threads that read images", min=1, metavar="N")] = 4,
    overwrite: Annotated[bool, option("score again what was scored before", "--overwrite")] = False,
    report_only: Annotated[bool, option("write the reports of --output anew, score nothing", "--report-only")] = False,
    thumbnails: Annotated[
        bool, option("small copies of images in the HTML page", "--thumbnails/--no-thumbnails")
    ] = True,
    check_published: Annotated[
        bool, option("qscorer beside its published figures; exit code 1 if they differ", "--check-published")
    ] = False,
    debug: Debug = False,
) -> None:
    """Compare metrics with human opinions on datasets: a leaderboard.

    Scores go image by image into tables in --output; repeat the command after
    an interruption, or with more metrics: nothing is scored twice. Then
    leaderboard.csv (pyiqa's form), .md, .json and report.html. Several GPUs:
    accelerate launch -m pyiqa_qscorer.cli benchmark ... Exit code 0: all
    scored, 1: something failed, 2: it could not start.

    [bold]Examples[/bold]
    $ pyiqa-qscorer benchmark -m qscorer -m piqe -d koniq10k -d livec --data-root DIR
    $ pyiqa-qscorer benchmark -m ssim -m vif -d my.csv --images DIR --dmos
    """
    with clean_errors(debug):
        require("benchmark", "matplotlib", "jinja2", "accelerate")
        from ..evaluation.leaderboard_report import terminal_tables, write_reports
        from ..evaluation.published import check_published as differences
        from ..evaluation.results import read_leaderboard
        from ..report import print_tables

        problems: list[Problem] = []
        if not report_only:
            specs = metric_specs(metrics or [], settings or [])
            of_tables = images, references, columns or [], dmos
            wanted = dataset_specs(datasets or [], *of_tables, split, phase, original_size)
            how = {"device": device, "batch_size": batch_size, "workers": workers, "overwrite": overwrite}
            problems = score(specs, wanted, output, data_root, **how)
        board = read_leaderboard(output)
        for path in write_reports(board, output, thumbnails):
            say(f"{path}", style="dim")
        print_tables(terminal_tables(board), cli_output.out)
        for alarm in board.alarms:
            say(("warning: ", "bold red"), (printable(alarm), "bold"))
        failed = _print_problems(board, problems)
        if check_published:
            failed |= not _print_published(differences(board.entries))
    raise typer.Exit(1 if failed else 0)


def score(
    specs: list[MetricSpec], wanted: list[DatasetSpec], output: Path, data_root: Path, **how: Any
) -> list[Problem]:
    """Read the datasets and run the benchmark, `how` as for `run_benchmark`; one progress bar per metric and dataset.

    Of several processes all but the first end here: the first one reports.
    """
    from accelerate import PartialState

    from ..evaluation.datasets import open_dataset
    from ..evaluation.runner import run_benchmark
    from ..host import pyiqa_metrics

    for spec in specs:
        pyiqa_metrics.describe_metric(spec.name)  # an unknown name is said before anything is read
    opened = [open_dataset(spec, data_root) for spec in wanted]
    try:
        problems = run_benchmark(specs, opened, output, progress=_progress, **how)
    except KeyboardInterrupt:
        say(("Interrupted. ", "bold yellow"), f"What was scored is kept in {output}: repeat the command to go on.")
        raise typer.Exit(130) from None
    if not PartialState().is_main_process:
        raise typer.Exit(0)
    return problems


@contextmanager
def _progress(metric: str, dataset: str, images: int, before: int) -> Iterator[Callable[[Any], None]]:
    done = f", {before:,} scored before" if before else ""
    say(f"{metric} on {dataset}: {count(images, 'image')} to score{done}", style="dim")
    with cli_output.progress_bar(images) as advance:
        yield advance


def _print_problems(board: Leaderboard, problems: Sequence[Problem]) -> bool:
    """What failed, on stderr; whether anything did."""
    from ..evaluation.leaderboard_report import failures

    lines = [f"{problem.metric} on {problem.dataset}: not run: {problem.reason}" for problem in problems]
    named = {(problem.metric, problem.dataset) for problem in problems}
    for dataset in board.datasets:
        entries = [entry for entry in board.of(dataset) if (entry.metric, dataset) not in named]
        lines += [f"{text} ({dataset})" for text in failures(entries)]
    for line in lines:
        say(("failed ", "red"), printable(line))
    return bool(lines)


def _print_published(differences: Sequence[PublishedDifference]) -> bool:
    """Published figures beside ours; whether all agree."""
    from ..evaluation.published import SOURCE, TOLERANCE
    from ..report import NONE, Table, number, print_tables

    if not differences:
        raise InputError(
            "--check-published compares qscorer, qscorer_8bit or qscorer_4bit on koniq10k, spaq, kadid10k, livec, "
            "agiqa3k or csiq, and this output has none of these; an own CSV file can be called so with agiqa3k=FILE.csv"
        )
    rows = [
        (
            *(one.metric, one.dataset, one.measure, "agrees" if one.agrees else "differs"),
            *(number(one.published), number(one.here, 4)),
            NONE if one.difference is None else f"{one.difference:+.4f}",
            str(one.images),
        )
        for one in differences
    ]
    columns = ("metric", "dataset", "measure", "", "published", "here", "difference", "images")
    title = f"Published figures ({SOURCE}); agrees: within {TOLERANCE}"
    print_tables([Table(title, columns, rows, words=4)], cli_output.out)
    return all(one.agrees for one in differences)


# --- what the user typed ----------------------------------------------------------------------------------------------


def metric_specs(names: Sequence[str], settings: Sequence[str]) -> list[MetricSpec]:
    """`[LABEL=]NAME` and `LABEL.OPTION=VALUE` as metrics with options."""
    from ..evaluation.runner import MetricSpec

    if not names:
        raise InputError("no metric: give some with -m, e.g. -m qscorer -m piqe")
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
    names: Sequence[str],
    images: Path | None,
    references: Path | None,
    columns: Sequence[str],
    dmos: bool,
    split: str | None = None,
    phase: str | None = None,
    original_size: bool = False,
) -> list[DatasetSpec]:
    """`[LABEL=]NAME` or `[LABEL=]FILE.csv` as datasets; the folders, columns and `dmos` are for the CSV files.

    To these `split` says nothing, and `phase` only with a split column. That is an error where all datasets are CSV
    files, and said where others can use it.
    """
    from ..evaluation.datasets import DatasetSpec

    if not names:
        raise InputError("no dataset: give some with -d, e.g. -d koniq10k, or a CSV file of your own")
    roles = {}
    for column in columns:
        role, equals, name = column.partition("=")
        if not equals:
            raise InputError(f"--columns takes ROLE=COLUMN, got {column!r}")
        roles[role] = name
    unused = (
        {}
        if split is None
        else {f"--split {split}": "is for pyiqa's datasets: give --columns split=COLUMN and --phase NAME"}
    )
    own_phase = phase if "split" in roles else None
    if phase != own_phase:
        unused[f"--phase {phase}"] = "needs --columns split=COLUMN"
    own = [name.lower().endswith(".csv") for name in names]
    if (images or references or roles or dmos) and not any(own):
        raise InputError("--images, --references, --columns and --dmos are for CSV files, but -d names none")
    specs = []
    for (label, name), is_table in zip(map(_labelled, names), own, strict=True):
        if not is_table:
            number = int(split) if split is not None and split.isdigit() else split
            specs.append(DatasetSpec(label, name, split=number, phase=phase, original_size=original_size))
            continue
        label = Path(name).stem if label == name else label
        for flag, reason in unused.items():
            if all(own):
                raise InputError(f"{flag} {reason} for {name}")
            say(("warning: ", "yellow"), printable(f"{flag} is not used for {label}: it {reason}"))
        specs.append(DatasetSpec(label, None, Path(name), images, references, roles, dmos, phase=own_phase))
    return specs


def _labelled(text: str) -> tuple[str, str]:
    label, equals, name = text.partition("=")
    return (label, name) if equals else (text, text)


def _value(text: str) -> Any:
    """true, false, numbers and null as such, everything else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
