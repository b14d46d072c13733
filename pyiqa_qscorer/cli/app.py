"""Command line `pyiqa-qscorer`: its commands, each of which parses arguments and prints, no more.

Exit codes: 0 all well, 1 some images failed (or `doctor` found a problem), 2 wrong usage or a setup
that cannot work, 70 an error of this program, with its traceback, 130 interrupted. What is heavy
(torch) is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from .. import __version__
from .benchmark import benchmark
from .demo import demo
from .doctor import doctor
from .download import download, merge
from .error_analysis import errors
from .options import option
from .render import render
from .score import score
from .semantic_confusion import confusion
from .serve import serve
from .train import train

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


def _show_version(asked: bool) -> None:
    if asked:
        print(f"pyiqa-qscorer {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, option("show the version and exit", "--version", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command(no_args_is_help=True)(score)
app.command(no_args_is_help=True)(benchmark)
app.command(no_args_is_help=True)(errors)
app.command(no_args_is_help=True)(confusion)
app.command(no_args_is_help=True)(train)
app.command(no_args_is_help=True)(render)
app.command()(serve)
app.command()(demo)
app.command()(download)
app.command(no_args_is_help=True)(merge)
app.command()(doctor)
