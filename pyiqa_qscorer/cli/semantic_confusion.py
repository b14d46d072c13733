"""`pyiqa-qscorer confusion`: what tuning did to a model's language. Argument parsing and printing only."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from . import console as cli_output
from .console import checkpoint_name, clean_errors, printable, require, say
from .options import Debug, Device, option

of_pictures = partial(option, rich_help_panel="Pictures of unlike quality")


def confusion(
    tuned: Annotated[list[str], option("a network trained to score; repeatable", "--tuned", metavar="ID|DIR")],
    base: Annotated[
        str | None, option("the model before; default: the one that the first adapter names", metavar="ID|DIR")
    ] = None,
    mos: Annotated[Path | None, of_pictures("CSV file: file name, MOS, higher is better", metavar="FILE.csv")] = None,
    data: Annotated[Path | None, of_pictures("folder of its images", metavar="DIR")] = None,
    mos_column: Annotated[str | None, of_pictures("default: the second", metavar="NAME")] = None,
    limit: Annotated[int, of_pictures("so many of them, drawn at random", min=10, metavar="N")] = 200,
    output: Annotated[
        Path | None, option("folder for confusion.html, .json and .png", "--output", "-o", metavar="DIR")
    ] = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Show how far tuning for quality changed a model's language.

    Compares tuned models with their base on texts that have nothing to do with
    pictures: drift of next-token probabilities, level words in another sense,
    100 reviews answered by level words, probability of score tokens. With --mos
    and --data: how far picture quality leaks into unrelated answers.

    [bold]Examples[/bold]
    $ pyiqa-qscorer confusion --tuned runs/levels/checkpoint_qscorer --tuned runs/tokens/checkpoint_qscorer -o report
    $ pyiqa-qscorer confusion --tuned DIR --mos biq2021/validation.csv --data biq2021/validation
    """
    with clean_errors(debug):
        require("analysis", "matplotlib", "jinja2")
        if (mos is None) != (data is None):
            raise ValueError("--mos and --data go together: a table of opinions, and the folder of its images")
        pictures, opinions = ([], []) if mos is None or data is None else _pictures(mos, data, mos_column, limit)

        from ..analysis.confusion import compare_all
        from ..analysis.confusion_report import conclusions, tables, write_report
        from ..analysis.language_model import LanguageModel, backbone_of
        from ..report import print_tables

        place = base or backbone_of(tuned[0])
        if place is None:
            raise ValueError(f"--base must be given: {tuned[0]} does not name the model that it was tuned from")
        say(f"Asking {printable(place)} and {len(tuned)} tuned ...", style="dim")

        def load(checkpoint: str) -> LanguageModel:
            model = LanguageModel(checkpoint, device=device)
            model.name = checkpoint_name(checkpoint)
            return model

        found = compare_all(load(place), map(load, tuned), pictures, opinions)
        print_tables(tables(found), cli_output.out)
        for sentence in conclusions(found):
            say(printable(sentence))
        if output is not None:
            print(write_report(output, found, checkpoint_name(place)))


def _pictures(table: Path, folder: Path, column: str | None, limit: int) -> tuple[list[Path], list[float]]:
    """Paths and MOS of rows drawn at random."""
    import numpy as np

    from ..data.opinions import read_opinions
    from ..errors import OpinionTableError

    rows = [row for row in read_opinions(table, folder, mos_column=column) if np.isfinite(row.mos)]
    if len(rows) < 10:
        raise OpinionTableError(f"{table} must have at least 10 rows with a number as MOS, has {len(rows)}")
    drawn = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:limit]]
    return [Path(row.path) for row in drawn], [row.mos for row in drawn]
