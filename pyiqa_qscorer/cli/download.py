"""Commands `pyiqa-qscorer download` and `merge`: argument parsing and printing only."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..registry import PUBLISHED_METRIC, resolve_metric_options
from . import console as cli_output
from .console import clean_errors, say
from .options import Base, BaseRevision, CacheDir, Checkpoint, Debug, LocalFilesOnly, Metric, Revision, option

if TYPE_CHECKING:
    from ..checkpoints import CheckpointSource


class SavedLayout(str, Enum):
    """Checkpoint layouts that `merge` writes."""

    QSCORER = "qscorer"
    PUBLISHED = "published"


def download(
    context: typer.Context,
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
        source = _source(context)
        cli_output.print_plan(source.plan())
        for folder in source.fetch():
            cli_output.print_folder(folder)


def merge(
    context: typer.Context,
    output: Annotated[Path, option("new or empty folder", "--output", "-o", metavar="DIR")],
    layout: Annotated[
        SavedLayout, option("for this package, or for the published code", metavar="qscorer|published")
    ] = SavedLayout.QSCORER,
    dtype: Annotated[str, option("precision to write: float16, bfloat16 or float32", metavar="TYPE")] = "float16",
    metric: Metric = PUBLISHED_METRIC,
    checkpoint: Checkpoint = None,
    base: Base = None,
    revision: Revision = None,
    base_revision: BaseRevision = None,
    local_files_only: LocalFilesOnly = None,
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
        source = _source(context)
        from ..checkpoints import merge_checkpoint

        say(f"Merging {source.checkpoint} ...", style="dim")
        written: dict[str, Any] = {"layout": layout.value, "dtype": dtype}
        cli_output.print_folder(merge_checkpoint(output, source, **written))


def _source(context: typer.Context) -> CheckpointSource:
    """Where the weights are: those of the metric, unless options say otherwise."""
    metric = context.params["metric"]
    resolve_metric_options(metric, {})  # an unknown name is said before torch is imported
    from ..checkpoints import CheckpointSource

    names = {field.name for field in fields(CheckpointSource)}
    options = resolve_metric_options(metric, {name: context.params.get(name) for name in names})
    return CheckpointSource(**{name: value for name, value in options.items() if name in names})
