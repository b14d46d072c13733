"""Command line `pyiqa-qscorer`: argument parsing and printing only.

Exit codes: 0 all well, 1 some images failed (or `doctor` found a problem), 2 wrong usage or a setup
that cannot work, 130 interrupted. What is heavy (torch) is imported inside the commands, so that
`--help` answers at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyiqa_qscorer import __version__, cli_errors, cli_output
from pyiqa_qscorer.cli_benchmark import add_benchmark
from pyiqa_qscorer.cli_output import count, say
from pyiqa_qscorer.errors import QScorerError
from pyiqa_qscorer.names import DEFAULT_METRIC, METRICS, OPTIONS, PUBLISHED_METRIC, resolve_metric_options

if TYPE_CHECKING:
    from pyiqa_qscorer.score_files import ScoreRow

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
    app()


# --- options that several commands share, spelled as in `create_metric` and `Scorer` -------------


def _option(help: str, *flags: str, metavar: str = "", **settings: Any) -> Any:
    """An option with help in the style of `names.OPTIONS`; no `metavar` for a flag."""
    return typer.Option(*flags, help=help.replace("[", r"\["), metavar=metavar, **settings)


def _model_option(name: str, metavar: str = "", *flags: str) -> Any:
    panel = {"rich_help_panel": "Model", "show_default": False}
    return _option(OPTIONS[name], *flags, metavar=metavar, **panel)


Metric = Annotated[
    str,
    _option(", ".join(METRICS), "--metric", "-m", metavar="NAME", rich_help_panel="Model"),
]
ScoreMetric = Annotated[
    str | None,
    _option(
        ", ".join(METRICS),
        "--metric",
        "-m",
        metavar="NAME",
        rich_help_panel="Model",
        show_default=f"{DEFAULT_METRIC}; {PUBLISHED_METRIC} with --checkpoint",
    ),
]
Checkpoint = Annotated[str | None, _model_option("checkpoint", "ID|DIR")]
Base = Annotated[str | None, _model_option("base", "ID|DIR")]
Revision = Annotated[str | None, _model_option("revision", "REV")]
BaseRevision = Annotated[str | None, _model_option("base_revision", "REV")]
CacheDir = Annotated[str | None, _model_option("cache_dir", "DIR")]
LocalFilesOnly = Annotated[bool, _model_option("local_files_only", "", "--local-files-only")]
Dtype = Annotated[str | None, _model_option("dtype", "TYPE")]
Prompt = Annotated[str | None, _model_option("prompt", "TEXT")]
Clamp = Annotated[bool | None, _model_option("clamp", "", "--clamp/--no-clamp")]
AttnImplementation = Annotated[str | None, _model_option("attn_implementation", "NAME")]
Debug = Annotated[bool, _option("show the traceback of an error", "--debug")]


class SavedLayout(str, Enum):
    """Checkpoint layouts that `merge` writes."""

    QSCORER = "qscorer"
    PUBLISHED = "published"


def _show_version(asked: bool) -> None:
    if asked:
        print(f"pyiqa-qscorer {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        _option("show the version and exit", "--version", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


# --- score --------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def score(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="image files, folders (searched in all depths), patterns such as 'a/**/*.png'",
            metavar="INPUT",
            show_default=False,
        ),
    ],
    metric: ScoreMetric = None,
    output: Annotated[
        Path | None,
        _option("write a table: .csv, .jsonl or .parquet", "--output", "-o", metavar="FILE", show_default=False),
    ] = None,
    resume: Annotated[bool, _option("go on from an interrupted or finished --output", "--resume")] = False,
    overwrite: Annotated[bool, _option("replace an existing --output", "--overwrite")] = False,
    device: Annotated[
        str | None,
        _option("cpu, cuda, cuda:1, ...", metavar="DEVICE", show_default="cuda if there, else cpu"),
    ] = None,
    batch_size: Annotated[int, _option("images per pass of the model", min=1, metavar="N")] = 16,
    workers: Annotated[
        int | None,
        _option(
            "threads that read images",
            min=1,
            metavar="N",
            show_default="one per core, at most 16",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    base: Base = None,
    revision: Revision = None,
    base_revision: BaseRevision = None,
    dtype: Dtype = None,
    prompt: Prompt = None,
    clamp: Clamp = None,
    attn_implementation: AttnImplementation = None,
    local_files_only: LocalFilesOnly = False,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Score images.

    Without --output: a table, best first, in a terminal; in a pipe lines
    "score TAB path". Exit code 0 if all images were scored, 1 if some failed,
    2 if it could not start.

    [bold]Examples[/bold]
    $ pyiqa-qscorer score photo.jpg holiday/
    $ pyiqa-qscorer score 'data/**/*.png' -o scores.csv --resume
    $ pyiqa-qscorer score photos/ | sort -rn | head
    """
    options = {
        "checkpoint": checkpoint,
        "base": base,
        "revision": revision,
        "base_revision": base_revision,
        "dtype": dtype,
        "prompt": prompt,
        "clamp": clamp,
        "attn_implementation": attn_implementation,
        "local_files_only": local_files_only or None,
        "cache_dir": cache_dir,
    }
    with _clean_errors(debug):
        from pyiqa_qscorer.score_files import InputError, file_key, find_images, score_files
        from pyiqa_qscorer.score_table import ScoreTable

        # The small model's options (float32, no base) do not fit a checkpoint that somebody brings.
        metric = metric or (DEFAULT_METRIC if checkpoint is None else PUBLISHED_METRIC)
        # What can be wrong with the command itself comes before torch and the model.
        resolve_metric_options(metric, options)
        if output is None and (resume or overwrite):
            raise InputError("--resume and --overwrite go with --output")
        table: ScoreTable[ScoreRow] | None = None if output is None else ScoreTable(output, resume, overwrite)
        found = find_images(inputs)
        if found.repeated:
            say(f"{count(found.repeated, 'image')} named twice: scored once", style="dim")

        from pyiqa_qscorer.scoring import Scorer

        say(f"Loading {metric}{f' from {checkpoint}' if checkpoint else ''} ...", style="dim")
        scorer = Scorer(metric, device, batch_size, workers, **options)
        todo = found.paths
        if table is not None:
            todo = table.open(scorer.name, scorer.identity).unfinished(found.paths)
            if done := len(found.paths) - len(todo):
                say(f"{count(done, 'image')} of {len(found.paths):,} scored before", style="dim")
        rows: list[ScoreRow] = []
        started = time.monotonic()
        try:
            with cli_output.progress_bar(len(todo)) as advance:
                for row in score_files(scorer, todo, table):
                    rows.append(row)
                    advance(row)
                    if table is None and not cli_output.out.is_terminal:
                        cli_output.print_line(row)
            if table is not None:
                table.finish(found.paths)
        except KeyboardInterrupt:
            kept = None if table is None else table.partial
            cli_output.print_interrupted(len(rows), len(todo), kept)
            raise typer.Exit(130) from None
        finally:
            if table is not None:
                table.close()
        timing = (len(rows), time.monotonic() - started)
        if table is not None:
            rows = [table.rows[file_key(path)] for path in found.paths]
        elif cli_output.out.is_terminal:
            cli_output.print_table(rows)
        cli_output.print_summary(rows, *timing, output)
    raise typer.Exit(1 if any(row.score is None for row in rows) else 0)


# --- train ---------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def train(
    config: Annotated[
        Path, typer.Argument(help="YAML file, or the name of an example of this package (koniq.yaml)", metavar="CONFIG")
    ],
    changes: Annotated[
        list[str] | None,
        _option("change a setting of the file, e.g. optimisation.seed=1; repeatable", "--set", metavar="KEY=VALUE"),
    ] = None,
    photos: Annotated[
        Path | None,
        _option("folder that the photo folders of synthetic data are below (data.photos)", metavar="DIR"),
    ] = None,
    resume: Annotated[
        bool, _option("go on from the newest complete state in the output folder", "--resume/--no-resume")
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
    with _clean_errors(debug):
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


# --- errors --------------------------------------------------------------------------------------

app.command(no_args_is_help=True)(cli_errors.errors)


# --- download, merge, doctor --------------------------------------------------------------------


@app.command()
def download(
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
    with _clean_errors(debug):
        source = _source(metric, checkpoint, base, revision, base_revision, False, cache_dir)

        from pyiqa_qscorer.checkpoints import download_checkpoint, plan_checkpoint

        plan = plan_checkpoint(**source)
        cli_output.print_plan(plan)
        for folder in download_checkpoint(**source):
            cli_output.print_folder(folder)


@app.command(no_args_is_help=True)
def merge(
    output: Annotated[
        Path,
        _option("new or empty folder", "--output", "-o", metavar="DIR"),
    ],
    layout: Annotated[
        SavedLayout, _option("for this package, or for the published code", metavar="qscorer|published")
    ] = SavedLayout.QSCORER,
    dtype: Annotated[str, _option("precision to write: float16, bfloat16 or float32", metavar="TYPE")] = "float16",
    metric: Metric = PUBLISHED_METRIC,
    checkpoint: Checkpoint = None,
    base: Base = None,
    revision: Revision = None,
    base_revision: BaseRevision = None,
    local_files_only: LocalFilesOnly = False,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Write a LoRA checkpoint and its base as one folder.

    It loads faster and needs no base.

    [bold]Example[/bold]
    $ pyiqa-qscorer merge -o merged/
    $ pyiqa-qscorer score photo.jpg --checkpoint merged/
    """
    with _clean_errors(debug):
        source = _source(metric, checkpoint, base, revision, base_revision, local_files_only, cache_dir)

        from pyiqa_qscorer.checkpoints import merge_checkpoint

        say(f"Merging {source['checkpoint']} ...", style="dim")
        folder = merge_checkpoint(output, **source | {"layout": layout.value, "dtype": dtype})
        cli_output.print_folder(folder)


@app.command()
def doctor(
    as_json: Annotated[bool, _option("print the facts as JSON", "--json")] = False,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Show versions, devices, memory, downloads, and which metric can run here.

    Asks no server. Exit code 1 if something is wrong with the installation.
    """
    with _clean_errors(debug):
        from pyiqa_qscorer.doctor import examine

        report = examine(cache_dir)
        if as_json:
            print(json.dumps(report.as_dict(), indent=2))
        else:
            cli_output.print_report(report)
    raise typer.Exit(1 if report.problems else 0)


def _source(
    metric: str,
    checkpoint: str | None,
    base: str | None,
    revision: str | None,
    base_revision: str | None,
    local_files_only: bool,
    cache_dir: str | None,
) -> dict[str, Any]:
    """What says where the weights are: those of the metric, unless given otherwise."""
    given = {
        "checkpoint": checkpoint,
        "base": base,
        "revision": revision,
        "base_revision": base_revision,
        "local_files_only": local_files_only,
        "cache_dir": cache_dir,
    }
    options = resolve_metric_options(metric, given)
    return {name: options[name] for name in given if name in options}


@contextmanager
def _clean_errors(debug: bool) -> Iterator[None]:
    """What the package raises on purpose becomes one message and exit code 2."""
    cli_output.use_stderr_for_notices()
    try:
        yield
    except KeyboardInterrupt:
        say(("Interrupted.", "bold yellow"))
        raise typer.Exit(130) from None
    except (QScorerError, ValueError) as error:
        if debug:
            raise
        cli_output.say_error(error)
        raise typer.Exit(2) from error


add_benchmark(app, _clean_errors)


if __name__ == "__main__":
    main()
