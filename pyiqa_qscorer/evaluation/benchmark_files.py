"""Files of a benchmark's output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import files as atomic_files
from ..errors import InputError, OutputError

MACHINE_FACTS = ("processor", "cores", "threads")  # of the run that scored; facts files of older versions lack them


def table_path(output: Path, dataset: str, metric: str) -> Path:
    """Table of a metric on a dataset."""
    return output / "scores" / dataset / f"{metric}.csv"


def read_facts(path: Path) -> dict[str, Any]:
    """Content of a facts file; None for machine facts that it lacks. Raises `InputError` if it is none."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): delete it and run the benchmark again") from error
    if not isinstance(facts, dict) or "dataset" not in facts:
        raise InputError(f"{path} is not of a benchmark: delete it, or use another output folder")
    return dict.fromkeys(MACHINE_FACTS) | facts


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it. Raises `OutputError`; the old file then stays."""
    try:
        atomic_files.write_text(path, text, errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; put it right and repeat the command") from error
