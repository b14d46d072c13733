"""Options that several commands share, spelled as in `create_metric` and `Scorer`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from ..registry import DEFAULT_METRIC, METRICS, OPTIONS, PUBLISHED_METRIC, default_metric, resolve_metric_options

Command = TypeVar("Command", bound=Callable[..., None])
# Type and metavar of the options that are not plain text; flags of those that are switches.
_NUMBERS = ("min_pixels", "max_pixels")
_SWITCHES = {"clamp": "--clamp/--no-clamp", "compile": "--compile", "local_files_only": "--local-files-only"}
_METAVARS = {
    **dict.fromkeys(("checkpoint", "base"), "ID|DIR"),
    **dict.fromkeys(("revision", "base_revision"), "REV"),
    **dict.fromkeys(_NUMBERS, "N"),
    **{"dtype": "TYPE", "prompt": "TEXT", "attn_implementation": "NAME", "cache_dir": "DIR"},
}


def option(help: str, *flags: str, metavar: str = "", **settings: Any) -> Any:
    """An option with help in the style of `registry.OPTIONS`; no `metavar` for a flag."""
    return typer.Option(*flags, help=help.replace("[", r"\["), metavar=metavar, **settings)


def _model_option(name: str) -> Any:
    flags = [_SWITCHES[name]] if name in _SWITCHES else []
    panel = {"rich_help_panel": "Model", "show_default": False}
    return option(OPTIONS[name], *flags, metavar=_METAVARS.get(name, ""), **panel)


def model_options(*names: str) -> Callable[[Command], Command]:
    """Give a command options of `registry.OPTIONS`, by default all; it gets them as `**options`, None if not given."""

    def extend(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        added = []
        for name in names or OPTIONS:
            kind: Any = int if name in _NUMBERS else bool if name in _SWITCHES else str
            hint = Annotated[kind | None, _model_option(name)]
            added.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
        own = [one for one in signature.parameters.values() if one.kind != inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return command

    return extend


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
CacheDir = Annotated[str | None, _model_option("cache_dir")]
Device = Annotated[
    str | None, option("cpu, cuda, cuda:1, ...", metavar="DEVICE", show_default="cuda if there, else cpu")
]
Debug = Annotated[bool, option("show the traceback of an error", "--debug")]


def chosen_metric(metric: str | None, options: dict[str, Any]) -> str:
    """The metric name of a command with `ScoreMetric` and `model_options`, both checked without torch."""
    metric = metric or default_metric(options["checkpoint"])
    resolve_metric_options(metric, options)
    return metric
