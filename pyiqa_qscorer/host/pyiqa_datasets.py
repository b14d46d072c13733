"""pyiqa's datasets by name, read and split by pyiqa's own loaders."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.opinions import OpinionRow
from ..errors import QScorerError
from ..registry import nearest

if TYPE_CHECKING:
    from PIL import Image


def pyiqa_dataset(
    name: str, data_root: Path, options: dict[str, Any], *, download: bool = False
) -> tuple[list[OpinionRow], dict[str, Any]]:
    """Rows of a dataset that pyiqa knows by name, read and split by pyiqa's own loader.

    Args:
        options: pyiqa's dataset options, e.g. `phase`, `split_index`.
        download: let pyiqa fetch what is missing; else that is an error.

    Returns:
        The rows, on the dataset's own scale, with references where it has them; and pyiqa's facts of the dataset
        (`mos_range`, `lower_better`, `augment`), with `transform`, which does to pictures what `augment` asks for.

    Raises:
        QScorerError: unknown name, missing folder or table, an unknown split, or a dataset of pairs without MOS.
    """
    import pyiqa

    known = pyiqa.get_dataset_info()
    if name not in known:
        raise QScorerError(f"pyiqa has no dataset {name!r}; {nearest(name, known)}")
    info = known[name]
    if info["type"] not in _ROWS:
        raise QScorerError(f"dataset {name}: it holds choices between two images, not opinions of single images")
    for key in ("meta_info_file", "dataroot_target"):
        needed = data_root.joinpath(*Path(info[key]).parts[1:])
        if not needed.exists() and not download:
            raise QScorerError(
                f"dataset {name}: {needed} is missing; put the dataset there, or say with --data-root (in a training "
                "configuration data.data_root) where it is. A training configuration can also let pyiqa fetch it, with "
                "download: true at the dataset"
            )
    try:
        with redirect_stdout(sys.stderr):  # pyiqa prints there
            dataset = pyiqa.load_dataset(name, data_root=str(data_root), dataset_opts=options)
    except AssertionError as error:
        raise QScorerError(f"dataset {name}: {error}") from error
    table, spread_of = getattr(dataset, "meta_info", None), {}
    spreads = [name for name in getattr(table, "columns", ()) if name.lower() in ("std", "mos_std", "dmos_std")]
    if table is not None and spreads:
        target = 1 if "FR" in type(dataset).__name__ else 0  # full-reference tables name the reference first
        for row_name, spread in zip(table.iloc[:, target], table[spreads[0]], strict=True):
            spread_of[os.path.normpath(str(row_name))] = float(spread)
    read = _ROWS[info["type"]]
    root = dataset.opt["dataroot_target"]  # relative to it, since LIVE has jp2k/img1.bmp and jpeg/img1.bmp
    rows = [
        OpinionRow(path, mos, spread_of.get(os.path.relpath(path, root)), reference)
        for path, mos, reference in (read(dataset, item) for item in dataset.paths_mos)
    ]
    if info.get("augment"):
        info["transform"] = _Augmentation(dataset)
    return rows, info


class _Augmentation:
    """The dataset's own picture transforms, those that its loader applies before it makes a tensor."""

    def __init__(self, dataset: Any) -> None:
        self._paired = getattr(dataset, "paired_trans", None)
        # The single-image pipeline ends in a conversion to a tensor, which scoring does itself.
        self._steps = dataset.trans.transforms[:-1] if self._paired is None else self._paired.transforms

    def __call__(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        if self._paired is not None and len(pictures) > 1:
            return list(self._paired(list(pictures)))
        return [functools.reduce(lambda changed, step: step(changed), self._steps, picture) for picture in pictures]


# How the rows of pyiqa's dataset classes hold path, MOS and reference.
_ROWS: dict[str, Callable[[Any, Any], tuple[str, float, str | None]]] = {
    "GeneralNRDataset": lambda dataset, item: (str(item[0]), float(item[1]), None),
    "LIVEChallengeDataset": lambda dataset, item: (str(item[0]), float(item[1]), None),
    "GeneralFRDataset": lambda dataset, item: (str(item[1]), float(item[2]), str(item[0])),
    "AVADataset": lambda dataset, item: (os.path.join(dataset.dataroot, str(item[0])), float(item[1]), None),
    "PieAPPDataset": lambda dataset, item: (
        os.path.join(dataset.dataroot, str(item[1])),
        float(item[2]),
        os.path.join(dataset.dataroot, str(item[0])),
    ),
}
