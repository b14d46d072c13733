"""Options that several commands share, spelled as in `create_metric` and `Scorer`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..registry import DEFAULT_METRIC, METRICS, OPTIONS, PUBLISHED_METRIC, default_metric, resolve_metric_options


def option(help: str, *flags: str, metavar: str = "", **settings: Any) -> Any:
    """An option with help in the style of `registry.OPTIONS`; no `metavar` for a flag."""
    return typer.Option(*flags, help=help.replace("[", r"\["), metavar=metavar, **settings)


def _model_option(name: str, metavar: str = "", *flags: str) -> Any:
    panel = {"rich_help_panel": "Model", "show_default": False}
    return option(OPTIONS[name], *flags, metavar=metavar, **panel)


Metric = Annotated[str, option(", ".join(METRICS), "--metric", "-m", metavar="NAME", rich_help_panel="Model")]
ScoreMetric = Annotated[
    str | None,
    option(
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
LocalFilesOnly = Annotated[bool | None, _model_option("local_files_only", "", "--local-files-only")]
Dtype = Annotated[str | None, _model_option("dtype", "TYPE")]
Prompt = Annotated[str | None, _model_option("prompt", "TEXT")]
MinPixels = Annotated[int | None, _model_option("min_pixels", "N")]
MaxPixels = Annotated[int | None, _model_option("max_pixels", "N")]
Clamp = Annotated[bool | None, _model_option("clamp", "", "--clamp/--no-clamp")]
AttnImplementation = Annotated[str | None, _model_option("attn_implementation", "NAME")]
Compile = Annotated[bool | None, _model_option("compile", "", "--compile")]
Device = Annotated[
    str | None, option("cpu, cuda, cuda:1, ...", metavar="DEVICE", show_default="cuda if there, else cpu")
]
Debug = Annotated[bool, option("show the traceback of an error", "--debug")]


def chosen_metric(context: typer.Context) -> tuple[str, dict[str, Any]]:
    """Metric name and options of a command that has `ScoreMetric` and some of `OPTIONS`, checked without torch."""
    given = context.params
    metric = given["metric"] or default_metric(given["checkpoint"])
    options = {name: given[name] for name in OPTIONS if name in given}
    resolve_metric_options(metric, options)
    return metric, options
