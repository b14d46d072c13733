"""`pyiqa-qscorer errors`: what a token formulation costs on a dataset. Argument parsing and printing only."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console as cli_output
from .console import checkpoint_name, clean_errors, count, printable, require, say
from .options import Debug, option

if TYPE_CHECKING:
    from ..analysis.measured import MeasuredModel
    from ..data.opinions import OpinionColumns, Opinions
    from ..training.dataset import LabelledImages

LISTED_ROWS = 3  # of those left out
network = partial(option, rich_help_panel="Networks")


def errors(
    mos: Annotated[Path, option("CSV file with one image per row", metavar="FILE.csv")],
    mos_column: Annotated[str | None, option("column of the MOS; default: the one named MOS", metavar="NAME")] = None,
    std_column: Annotated[
        str | None, option("spread of single opinions; soft labels are made of it", metavar="NAME")
    ] = None,
    vote_columns: Annotated[
        str | None,
        option("votes, or their shares, for score 1, 2, ...: MOS and spread come from them", metavar="NAME NAME ..."),
    ] = None,
    more_vote_columns: Annotated[
        # An option of click takes a fixed number of words; the rest of the names arrives here.
        list[str] | None, typer.Argument(hidden=True, metavar="")
    ] = None,
    range_: Annotated[
        tuple[float, float] | None,
        option("range of the MOS; default: its smallest and largest value", "--range", metavar="LOW HIGH"),
    ] = None,
    std_range: Annotated[
        tuple[float, float] | None, option("range that the spreads are on, where it is another", metavar="LOW HIGH")
    ] = None,
    lower_better: Annotated[bool, option("small MOS mean good quality (DMOS)", "--lower-better")] = False,
    skip_rows: Annotated[int, option("leave out the first N rows", min=0, metavar="N")] = 0,
    levels: Annotated[str, option("numbers of levels, such as 2..20 or 5,10,20", metavar="K")] = "2..20",
    detail: Annotated[int, option("number of levels that is shown in detail", min=2, max=100, metavar="K")] = 5,
    seed: Annotated[int, option("of samples and simulations", min=0, metavar="N")] = 0,
    output: Annotated[
        Path | None, option("folder for errors.html, .csv, .json and pictures", "--output", "-o", metavar="DIR")
    ] = None,
    checkpoint: Annotated[
        list[str] | None, network("measure this trained network too; repeatable", metavar="ID|DIR")
    ] = None,
    data: Annotated[Path | None, network("folder of the images that the table names", metavar="DIR")] = None,
    file_column: Annotated[str | None, network("column of the file names; default: the first", metavar="NAME")] = None,
    base: Annotated[str | None, network("model under a LoRA checkpoint", metavar="ID|DIR")] = None,
    device: Annotated[str | None, network("cpu, cuda, ...", metavar="DEVICE")] = None,
    batch_size: Annotated[int, network("images per pass", min=1, metavar="N")] = 16,
    debug: Debug = False,
) -> None:
    """Show what telling a MOS by words or tokens costs on your dataset.

    Errors of MOS -> label -> MOS, and the best SRCC that is left, for one-hot
    levels, soft labels and score tokens. With --checkpoint and --data: the
    measured error of trained networks beside it.

    [bold]Examples[/bold]
    $ pyiqa-qscorer errors --mos koniq.csv --vote-columns c1 c2 c3 c4 c5 --std-column std -o report
    $ pyiqa-qscorer errors --mos live.csv --range 0 100 --lower-better --levels 5,10,20
    $ pyiqa-qscorer errors --mos val.csv --data photos --checkpoint out/checkpoint_qscorer
    """
    with clean_errors(debug):
        require("analysis", "matplotlib", "jinja2", *(("pydantic", "yaml") if checkpoint else ()))
        from ..analysis.study import study
        from ..data.opinions import OpinionColumns, read_opinion_table

        if bool(checkpoint) != (data is not None):
            raise ValueError("--checkpoint and --data go together: a network, and the folder of its images")
        wanted = _levels(levels)
        if more_vote_columns and vote_columns is None:
            raise ValueError(
                f"errors takes options only, got {' '.join(more_vote_columns)!r}; the table goes with --mos"
            )
        votes = () if vote_columns is None else (vote_columns, *(more_vote_columns or ()))
        columns = OpinionColumns(mos_column, std_column, votes, range_, std_range, lower_better, skip_rows)
        if data is not None and (votes or skip_rows):
            raise ValueError("--vote-columns and --skip-rows do not go with --checkpoint: give a table with a MOS")
        if mos_column == "score":
            from ..evaluation.datasets import refuse_scores

            refuse_scores(mos, mos_column, "--mos-column")
        opinions = read_opinion_table(mos, columns)
        labelled = None if data is None else _labelled(data, file_column, columns, opinions)
        found = study(opinions, wanted, detail, seed)
        options = {"base": base} if base else {}
        measured = _measure(checkpoint or [], options, labelled, device, batch_size) if labelled else []

        from ..analysis.error_report import conclusions, facts, tables, write_report
        from ..report import print_tables

        for name, text in facts(found):
            say((f"{name}: ", "dim"), printable(text))
        print_tables(tables(found, measured), cli_output.out)
        for sentence in conclusions(found, measured):
            say(printable(sentence))
        if output is not None:
            print(write_report(output, found, measured))


def _labelled(folder: Path, file_column: str | None, columns: OpinionColumns, opinions: Opinions) -> LabelledImages:
    """The images that networks are measured on; says which rows of the table are left out."""
    from ..training.dataset import read_dataset
    from ..training.dataset_config import FolderDataset

    config = FolderDataset(
        folder=folder,
        csv=opinions.path,
        file_column=file_column,
        mos_column=opinions.mos_column,
        std_column=columns.std,
        mos_range=(opinions.scale.low, opinions.scale.high),
        std_range=columns.std_range,
        lower_better=columns.lower_better,
    )
    labelled = read_dataset(config, "test", on_error="skip")
    if labelled.skipped:
        say((f"{count(len(labelled.skipped), 'row')} left out of the measurement:", "yellow"))
    for path, reason in labelled.skipped[:LISTED_ROWS]:
        say(printable(f"  {path}: {reason}"))
    if len(labelled.skipped) > LISTED_ROWS:
        say(f"  and {len(labelled.skipped) - LISTED_ROWS:,} more")
    return labelled


def _measure(
    checkpoints: list[str], options: dict[str, str], labelled: LabelledImages, device: str | None, batch_size: int
) -> list[MeasuredModel]:
    from ..analysis.measured import measure
    from ..scorer import build_metric, resolve_device

    measured = []
    for place in checkpoints:
        say(f"Scoring {len(labelled.images):,} images with {printable(place)} ...", style="dim")
        where = resolve_device(device)
        metric = build_metric("qscorer", {"checkpoint": place, **options}, where)
        measured.append(measure(checkpoint_name(place), metric.to(where), labelled, where, batch_size))
        if measured[-1].failed:
            say((f"{measured[-1].failed:,} images could not be scored and are left out", "yellow"))
    return measured


def _levels(text: str) -> list[int]:
    """Numbers of levels: "2..20", "5,10,20", "2..6,10"."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dots, last = part.partition("..")
            found += range(int(first), int(last) + 1) if dots else [int(first)]
    except ValueError:
        found = []
    if not found or min(found) < 2 or max(found) > 100:
        raise ValueError(f"--levels must be whole numbers from 2 to 100, such as 2..20 or 5,10,20, got {text!r}")
    return found
