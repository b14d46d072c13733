"""Command `pyiqa-qscorer train`: argument parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import console as cli_output
from .console import clean_errors, require
from .options import Debug, option


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
    data_root: Annotated[Path | None, option("folder of pyiqa's datasets (data.data_root)", metavar="DIR")] = None,
    resume: Annotated[
        bool, option("go on from the newest complete state in the output folder", "--resume/--no-resume")
    ] = True,
    debug: Debug = False,
) -> None:
    """Train a Q-Scorer, or go on with an interrupted training.

    Repeat the same command after an interruption: it goes on where it
    stopped. Several processes: torchrun --nproc-per-node 2 -m pyiqa_qscorer.cli.app train ...

    [bold]Examples[/bold]
    $ pyiqa-qscorer train koniq.yaml --data-root /data/iqa
    $ pyiqa-qscorer train my.yaml --set optimisation.batch_size=4
    $ pyiqa-qscorer train mini.yaml --photos photos/
    """
    with clean_errors(debug):
        require("train", "pydantic", "yaml", "accelerate", "tensorboard", "scipy", "tokenizers", "cv2", "av")
        from ..host.pyiqa_datasets import pyiqa_dataset
        from ..host.reference_metrics import ReferenceMetrics
        from ..synthetic.calibration import REFERENCE_METRICS
        from ..training.config import read_config
        from ..training.run import train as run

        overrides = dict(_key_and_value(change) for change in changes or ())
        for key, folder in (("data.photos", photos), ("data.data_root", data_root)):
            if folder is not None:
                overrides[key] = str(folder)
        compare = ReferenceMetrics(REFERENCE_METRICS)
        result = run(read_config(config, overrides), resume=resume, named_datasets=pyiqa_dataset, compare=compare)
        cli_output.print_training(result)
    raise typer.Exit(0 if result.finished else 130)


def _key_and_value(change: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = change.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, got {change!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key}: {value} is not YAML: {' '.join(str(error).split())}") from error
