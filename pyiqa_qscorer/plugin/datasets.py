"""pyiqa's datasets by name, for training."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pyiqa_qscorer.errors import QScorerError


def pyiqa_dataset(
    name: str, data_root: Path, options: dict[str, Any], *, download: bool = False
) -> tuple[list[tuple[str, float, float | None]], dict[str, Any]]:
    """Rows of a dataset that pyiqa knows by name, read and split by pyiqa's own loader.

    Args:
        options: pyiqa's dataset options, e.g. `phase`, `split_index`.
        download: let pyiqa fetch what is missing; else that is an error.

    Returns:
        (path, MOS, spread of opinions or None) per image, on the dataset's own scale, and pyiqa's facts of the dataset
        (`mos_range`, `lower_better`).

    Raises:
        QScorerError: unknown name, missing folder or table, or an unknown split.
    """
    import pyiqa

    known = pyiqa.get_dataset_info()
    if name not in known:
        near = get_close_matches(name, known, n=3)
        raise QScorerError(
            f"pyiqa has no dataset {name!r}; did you mean {' or '.join(near)}?"
            if near
            else f"pyiqa has no dataset {name!r}; there are: {', '.join(known)}"
        )
    info = known[name]
    for key in ("meta_info_file", "dataroot_target"):
        needed = data_root.joinpath(*Path(info[key]).parts[1:])
        if not needed.exists() and not download:
            raise QScorerError(
                f"dataset {name}: {needed} is missing; put the dataset there, give another data_root, or set "
                "download: true to let pyiqa fetch it"
            )
    try:
        with redirect_stdout(sys.stderr):  # pyiqa prints there
            dataset = pyiqa.load_dataset(name, data_root=str(data_root), dataset_opts=options)
    except AssertionError as error:
        raise QScorerError(f"dataset {name}: {error}") from error
    table = dataset.meta_info
    spread_column = next((column for column in table.columns if column.lower() in ("std", "mos_std", "dmos_std")), None)
    spread_of = {}
    if spread_column is not None:
        for row_name, spread in zip(table.iloc[:, _target_column(dataset)], table[spread_column], strict=True):
            spread_of[os.path.basename(str(row_name))] = float(spread)
    rows = [
        (str(item[-2]), float(item[-1]), spread_of.get(os.path.basename(str(item[-2])))) for item in dataset.paths_mos
    ]
    return rows, info


def _target_column(dataset: Any) -> int:
    """Column of the judged image in pyiqa's tables: full-reference ones name the reference first."""
    return 1 if "FR" in type(dataset).__name__ else 0
