"""Command `pyiqa-qscorer train`: argument parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyiqa_qscorer import cli_output
from pyiqa_qscorer.cli_options import Debug, option
from pyiqa_qscorer.cli_output import clean_errors


def train(
    config: Annotated[
        Path, typer.Argument(help="YAML file, or the name of an example of this package (koniq.yaml)", metavar="CONFIG")
    ],
    changes: Annotated[
        list[str] | None,
        option("change a setting of the file, e.g. optimisation.seed=1; repeatable", "--set", metavar="KEY=VALUE"),
    ] = None,
    photos: Annotated[
        Path | None,
        option("folder that the photo folders of synthetic data are below (data.photos)", metavar="DIR"),
    ] = None,
    resume: Annotated[
        bool, option("go on from the newest complete state in the output folder", "--resume/--no-resume")
    ] = True,
    debug: Debug = False,
) -> None:
    """Train a Q-Scorer, or go on with an interrupted training.

    Repeat the same command after an interruption: it goes on where it
    stopped. Several processes: torchrun --nproc-per-node 2 -m pyiqa_qscorer.cli train ...

    [bold]Examples[/bold]
    $ pyiqa-qscorer train koniq.yaml --set data.train.0.data_root=/data/iqa
    $ pyiqa-qscorer train my.yaml --set optimisation.batch_size=4
    $ pyiqa-qscorer train mini.yaml --photos photos/
    """
    with clean_errors(debug):
        import yaml

        from pyiqa_qscorer.plugin.datasets import pyiqa_dataset
        from pyiqa_qscorer.plugin.reference_metrics import ReferenceMetrics
        from pyiqa_qscorer.training.calibration import REFERENCE_METRICS
        from pyiqa_qscorer.training.config import read_config
        from pyiqa_qscorer.training.run import train as run

        pairs = dict(_key_and_value(change) for change in changes or ())
        overrides = {key: yaml.safe_load(value) for key, value in pairs.items()}
        if photos is not None:
            overrides["data.photos"] = str(photos)
        compare = ReferenceMetrics(REFERENCE_METRICS)
        result = run(read_config(config, overrides), resume=resume, named_datasets=pyiqa_dataset, compare=compare)
        cli_output.print_training(result)
    raise typer.Exit(0 if result.finished else 130)


def _key_and_value(change: str) -> tuple[str, str]:
    key, equals, value = change.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, got {change!r}")
    return key, value
