"""Command `pyiqa-qscorer render`: argument parsing and printing only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from . import console as cli_output
from .console import clean_errors, require
from .options import Debug, option
from .train import Changes, changed_settings


def render(
    recipe: Annotated[
        Path, typer.Argument(help="YAML file, or the name of a recipe of this package (mini.yaml)", metavar="RECIPE")
    ],
    photos: Annotated[
        Path | None, option("folder that the photo folders of the recipe are below (photos)", metavar="DIR")
    ] = None,
    output: Annotated[Path | None, option("folder to write (output)", "--output", "-o", metavar="DIR")] = None,
    workers: Annotated[int | None, option("processes (workers)", min=1, metavar="N")] = None,
    changes: Changes = None,
    debug: Debug = False,
) -> None:
    """Render distorted pictures with opinions, to train on: a folder and a table per set.

    Repeat the same command after an interruption: it goes on where it
    stopped. Prints the tables.

    [bold]Examples[/bold]
    $ pyiqa-qscorer render mini.yaml --photos photos/
    $ pyiqa-qscorer render my.yaml -o rendered/ --set train.chains.count=100
    """
    with clean_errors(debug):
        require("train", "pydantic", "yaml", "cv2", "av")
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from ..synthetic.recipe import read_recipe
        from ..synthetic.rendering import render_file

        file = read_recipe(recipe, changed_settings(changes, {"photos": photos, "output": output, "workers": workers}))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=cli_output.err) as bar:

            def begin(name: str) -> Callable[[int, int], None]:
                task = bar.add_task(f"Rendering {name}")
                return lambda done, total: bar.update(task, completed=done, total=total)

            tables = render_file(file, begin)
        for table in tables:
            print(table)
