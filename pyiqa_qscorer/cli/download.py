"""Commands `pyiqa-qscorer download` and `merge`: argument parsing and printing only."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..registry import PUBLISHED_METRIC, resolve_metric_options
from . import console as cli_output
from .console import clean_errors, say
from .options import Debug, Metric, model_options, option

if TYPE_CHECKING:
    from ..checkpoints import CheckpointSource


class SavedLayout(str, Enum):
    """Checkpoint layouts that `merge` writes."""

    QSCORER = "qscorer"
    PUBLISHED = "published"


@model_options("checkpoint", "base", "revision", "base_revision", "cache_dir")
def download(metric: Metric = PUBLISHED_METRIC, debug: Debug = False, **options: Any) -> None:
    """Fetch the weights of a metric, or complete an interrupted download.

    Prints the folders, one per line. HF_HOME, HF_ENDPOINT and HF_TOKEN work
    as with every tool for the Hugging Face Hub.

    [bold]Examples[/bold]
    $ pyiqa-qscorer download
    $ pyiqa-qscorer download --cache-dir /big/disk
    """
    with clean_errors(debug):
        source = _source(metric, options)
        cli_output.print_plan(source.plan())
        for folder in source.fetch():
            cli_output.print_folder(folder)


@model_options("checkpoint", "base", "revision", "base_revision", "local_files_only", "cache_dir")
def merge(
    output: Annotated[Path, option("new or empty folder", "--output", "-o", metavar="DIR")],
    layout: Annotated[
        SavedLayout, option("for this package, or for the published code", metavar="qscorer|published")
    ] = SavedLayout.QSCORER,
    dtype: Annotated[str, option("precision to write: float16, bfloat16 or float32", metavar="TYPE")] = "float16",
    metric: Metric = PUBLISHED_METRIC,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Write a LoRA checkpoint and its base as one folder.

    It loads faster and needs no base.

    [bold]Example[/bold]
    $ pyiqa-qscorer merge -o merged/
    $ pyiqa-qscorer score photo.jpg --checkpoint merged/
    """
    with clean_errors(debug):
        source = _source(metric, options)
        from ..checkpoints import merge_checkpoint

        say(f"Merging {source.checkpoint} ...", style="dim")
        written: dict[str, Any] = {"layout": layout.value, "dtype": dtype}
        cli_output.print_folder(merge_checkpoint(output, source, **written))


def _source(metric: str, options: dict[str, Any]) -> CheckpointSource:
    """Where the weights are: those of the metric, unless options say otherwise."""
    resolve_metric_options(metric, {})  # an unknown name is said before torch is imported
    from ..checkpoints import CheckpointSource

    names = {field.name for field in fields(CheckpointSource)}
    chosen = resolve_metric_options(metric, options)
    return CheckpointSource(**{name: value for name, value in chosen.items() if name in names})
