"""Metric names, their options, the published checkpoints: plain data that imports nothing heavy.

Example:
    >>> METRICS["qscorer-mini"].options["dtype"]
    'float32'
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import UnknownMetricError, UnknownOptionError

PUBLISHED_CHECKPOINT = "2kxx/Qscorer_lora_5_1"
PUBLISHED_BASE = "MAGAer13/mplug-owl2-llama2-7b"
MINI_CHECKPOINT = Path(__file__).with_name("weights") / "mini"

DEFAULT_METRIC = "qscorer-mini"  # where neither a metric nor a checkpoint is given: works at once
# Its options fit any checkpoint: the base is only used for a LoRA, and `auto` keeps float32 as it is.
PUBLISHED_METRIC = "qscorer"

BACKBONES = {
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm-500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
}
"""Short names of models to train on (`model.backbone`): recipes, no weights published by us, not trained by us."""

ARCH_NAME = "QScorer"  # `type` of the metric in pyiqa's configs and YAML files
SCORE_RANGE = (0.0, 5.0)  # scores of every metric, worst to best; where `clamp` is on, none lies outside

OPTIONS: dict[str, str] = {
    "checkpoint": "Hub id or local folder of the weights, in any layout",
    "base": "Hub id or local folder of the model under a LoRA checkpoint, if not the one it names",
    "revision": "branch, tag or commit of the checkpoint on the Hub",
    "base_revision": "branch, tag or commit of the base on the Hub",
    "dtype": "auto (float32 if this package saved it so; else float16 on GPUs, bfloat16 on the CPU), float16, "
    "bfloat16, float32, 8bit or 4bit",
    "prompt": "score, evaluation, training or a text with one <|image|>; default: the checkpoint's",
    "min_pixels": "of a picture as a backbone of dynamic resolution sees it; default: the checkpoint's",
    "max_pixels": "the same, upwards: fewer are faster, and other scores",
    "clamp": "keep scores inside [0, 5]",
    "attn_implementation": "sdpa, eager or flash_attention_2",
    "compile": "compile the model: minutes at first, once per batch size, faster after that",
    "local_files_only": "never go to the network",
    "cache_dir": "folder of downloads, instead of the Hub's own cache",
}
"""What every metric takes, spelled the same in `create_metric`, `Scorer` and the command line."""


@dataclass(frozen=True)
class MetricDefinition:
    """What a metric name stands for."""

    options: dict[str, Any]  # of `pyiqa_qscorer.QScorer`; the caller's own go over them
    description: str  # one line for lists and help texts


def _published(dtype: str, description: str) -> MetricDefinition:
    return MetricDefinition({"checkpoint": PUBLISHED_CHECKPOINT, "base": PUBLISHED_BASE, "dtype": dtype}, description)


METRICS: dict[str, MetricDefinition] = {
    "qscorer": _published("auto", "published Q-Scorer (7B), float16 on CUDA and bfloat16 on CPU"),
    "qscorer-mini": MetricDefinition(
        {"checkpoint": str(MINI_CHECKPOINT), "dtype": "float32"}, "small Q-Scorer inside this package, for CPUs"
    ),
    "qscorer_8bit": _published("8bit", "published Q-Scorer (7B), bitsandbytes 8-bit"),
    "qscorer_4bit": _published("4bit", "published Q-Scorer (7B), bitsandbytes 4-bit"),
}


def default_metric(checkpoint: object = None) -> str:
    """The metric that is meant where only a `checkpoint` is given, which needs other options than the small model's."""
    return DEFAULT_METRIC if checkpoint is None else PUBLISHED_METRIC


def pyiqa_config(name: str) -> dict[str, Any]:
    """A fresh entry for pyiqa's `DEFAULT_CONFIGS`. Raises `UnknownMetricError`."""
    low, high = SCORE_RANGE
    return {
        "metric_opts": {"type": ARCH_NAME, **_definition(name).options},
        "metric_mode": "NR",
        "lower_better": False,
        "score_range": f"{low:g}, {high:g}",
    }


def resolve_metric_options(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `pyiqa_qscorer.QScorer` for a metric name.

    Args:
        name: A key of `METRICS`.
        overrides: Options (keys of `OPTIONS`) that go over those of the name; None: not given.

    Raises:
        UnknownMetricError: No such metric; the message has the nearest names.
        UnknownOptionError: An option that no metric has; the message has the nearest names.
    """
    options = dict(_definition(name).options)
    for option, value in overrides.items():
        if option not in OPTIONS:
            raise UnknownOptionError(f"metric {name!r} has no option {option!r}; {nearest(option, OPTIONS)}")
        if value is not None:
            options[option] = value
    return options


def _definition(name: str) -> MetricDefinition:
    if name not in METRICS:
        raise UnknownMetricError(f"pyiqa-qscorer has no metric {name!r}; {nearest(name, METRICS)}")
    return METRICS[name]


def nearest(word: str, known: Iterable[str], list_all: str = "") -> str:
    """The names most like `word`, for an error message, and all there are, or how to see all of a long list.

    >>> nearest("qscore", ["qscorer", "piqe"])
    "did you mean 'qscorer'? The names are qscorer, piqe"
    """
    known = list(known)
    near = get_close_matches(word.lower().replace("-", "_"), known, n=5 if list_all else 3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    return hint + (list_all or f"The names are {', '.join(known)}")
