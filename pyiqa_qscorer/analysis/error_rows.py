"""Conversion error of one formulation on a dataset, summed chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..data.labels import Centers, Floats, level_centers
from .conversion_error import HIGH, LOW, uniform_errors, uniform_rounding_errors


@dataclass(frozen=True)
class ErrorRow:
    """Conversion error of one formulation on a dataset.

    Attributes:
        label: one of `conversion_error.LABELS`, or `score_token` (regression beside a score token).
        values: what the levels stand for; of a score token the number format.
        levels: K; None for a score token.
        images: how many the row is computed from.
        mae_standard_error: of drawing these images from the dataset; 0 where they are all of it.
        bias: mean of restored - MOS.
        label_part, restoration_part, cross_term: parts of `mse`, see `conversion_error.decompose`.
        srcc, plcc, krcc: of restored scores with the MOS: the ceiling for a network that predicts every label exactly.
        uniform_mae, uniform_mse: closed form for a uniform MOS; None where there is none, or where the values are of
            this dataset.
    """

    label: str
    values: str
    levels: int | None
    images: int
    mae: float
    mae_standard_error: float
    rmse: float
    mse: float
    bias: float
    max_error: float
    label_part: float
    restoration_part: float
    cross_term: float
    srcc: float
    plcc: float
    krcc: float
    uniform_mae: float | None = None
    uniform_mse: float | None = None


class ErrorSums:
    """Sums over images of what a row needs, added chunk by chunk."""

    def __init__(self) -> None:
        self.images = 0
        self.largest = 0.0
        self.sums = np.zeros(11)

    def add(self, mos: Floats, named: Floats, restored: Floats) -> None:
        """Arguments (n,), as `conversion_error.decompose`."""
        error, first, second = restored - mos, named - mos, restored - named
        # Around the middle of the scale, so that the variances below do not cancel.
        y, r = mos - (LOW + HIGH) / 2, restored - (LOW + HIGH) / 2
        parts = (np.abs(error), error, error**2, first**2, second**2, 2 * first * second, y, r, y * y, r * r, y * r)
        self.sums += [float(part.sum()) for part in parts]
        self.images += len(mos)
        self.largest = max(self.largest, float(np.abs(error).max(initial=0.0)))

    def row(self, label: str, values: str, levels: int | None, srcc: float, krcc: float, whole: bool) -> ErrorRow:
        mae, bias, mse, first, second, cross, y, r, yy, rr, yr = (self.sums / self.images).tolist()
        spread = math.sqrt(max(yy - y * y, 0.0) * max(rr - r * r, 0.0))
        variance = max(mse - mae**2, 0.0)
        return ErrorRow(
            label=label,
            values=values,
            levels=levels,
            images=self.images,
            mae=mae,
            mae_standard_error=0.0 if whole else math.sqrt(variance / self.images),
            rmse=math.sqrt(mse),
            mse=mse,
            bias=bias,
            max_error=self.largest,
            label_part=first,
            restoration_part=second,
            cross_term=cross,
            srcc=srcc,
            plcc=(yr - y * r) / spread if spread > 1e-12 else math.nan,
            krcc=krcc,
            **_uniform(label, values, levels),
        )


def _uniform(label: str, values: str, levels: int | None) -> dict[str, float]:
    """Closed form for a uniform MOS, where there is one."""
    if label == "score_token":
        mse, mae = uniform_rounding_errors(values)
    elif label == "one_hot" and levels is not None and values != "optimal":
        kind: Centers = "integers" if values == "integers" else "interval_centers"
        mse, mae = uniform_errors(level_centers(levels, kind=kind))
    elif label == "linear":
        mse = mae = 0.0
    else:
        return {}
    return {"uniform_mae": mae, "uniform_mse": mse}
