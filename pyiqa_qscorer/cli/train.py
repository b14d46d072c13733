"""Command `pyiqa-qscorer train`: argument parsing and printing only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from . import console as cli_output
from .console import clean_errors, require, say
from .options import Debug, option

Changes = Annotated[
    list[str] | None,
    option("change a setting of the file, e.g. training.seed=1; repeatable", "--set", metavar="KEY=VALUE"),
]


def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="YAML file, or the name of an example of this package (koniq.yaml)",
            metavar="CONFIG",
            show_default=False,
        ),
    ] = None,
    changes: Changes = None,
    examples: Annotated[
        bool, option("list the examples of this package, or copy them into a folder: --examples DIR", "--examples")
    ] = False,
    data_root: Annotated[Path | None, option("folder of pyiqa's datasets (data.data_root)", metavar="DIR")] = None,
    resume: Annotated[
        bool, option("go on from the newest complete state in the output folder", "--resume/--no-resume")
    ] = True,
    debug: Debug = False,
) -> None:
    """Train a Q-Scorer, or go on with an interrupted training.

    Repeat the same command after an interruption: it goes on where it
    stopped. Several processes: torchrun --nproc-per-node 2 -m pyiqa_qscorer.cli train ...

    [bold]Examples[/bold]
    $ pyiqa-qscorer train --examples
    $ pyiqa-qscorer train koniq.yaml --data-root /data/iqa
    $ pyiqa-qscorer train my.yaml --set training.per_device_train_batch_size=4
    """
    with clean_errors(debug):
        require("train", "pydantic", "yaml", "accelerate", "tensorboard", "filelock", "tokenizers")
        if examples:
            _show_examples(config)
            return
        if config is None:
            raise ValueError("name a configuration file; pyiqa-qscorer train --examples lists those of this package")
        from transformers.utils import logging as transformers_logging

        from ..training.config import read_config
        from ..training.run import train as run

        transformers_logging.set_verbosity_error()  # its notes are about settings that nobody made here
        transformers_logging.disable_progress_bar()
        settings = read_config(config, changed_settings(changes, {"data.data_root": data_root}))
        result = run(settings, resume=resume)
        cli_output.print_training(result)
    raise typer.Exit(0 if result.finished else 130)


def _show_examples(folder: Path | None) -> None:
    """Names of the examples with their first lines, or the paths of their copies."""
    from ..training.config import CONFIG_FOLDER

    for path in sorted(CONFIG_FOLDER.iterdir()):
        if folder is None:
            if path.suffix == ".yaml":
                say((path.name, "bold"), ": ", path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / path.name).exists():
            raise ValueError(f"{folder / path.name} exists: choose another folder, or remove it")
        print(shutil.copyfile(path, folder / path.name))
    if folder is None:
        say(f"All settings: {CONFIG_FOLDER / 'README.md'}", style="dim")


def changed_settings(changes: list[str] | None, given: dict[str, Any]) -> dict[str, Any]:
    """Overrides of a YAML file: those of `--set`, and options by the settings that they change; None: not given.

    Raises:
        ValueError: a change that is not KEY=VALUE, or whose value is no YAML.
    """
    changed = dict(_key_and_value(change) for change in changes or ())
    return changed | {
        key: str(value) if isinstance(value, Path) else value for key, value in given.items() if value is not None
    }


def _key_and_value(change: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = change.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, got {change!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key}: {value} is not YAML: {' '.join(str(error).split())}") from error
