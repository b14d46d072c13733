"""`QScore`: mean quality of a training loop's images, as a metric of torchmetrics (extra `torchmetrics`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .loss import QScorerLoss
from .metric import QScorer


class QScore(Metric):  # type: ignore[misc]
    """Mean no-reference quality of all images seen; in [0, 5], higher is better.

    Processes are summed up when it is computed, as torchmetrics does it. What a batch adds does not depend on how
    images are split into batches. The network stays out of `state_dict`, so it does not grow the checkpoints of a
    module that has this metric as a part; it moves with the metric.

    Args:
        metric: name or built `QScorer`, as for `QScorerLoss`; default `qscorer-mini`.
        device: where it runs; default CUDA where there is one, else CPU. `.to(device)` moves it.
        metric_options: those of `QScorer` (checkpoint, dtype, ...); only with a name.
        **kwargs: of `torchmetrics.Metric`, such as `sync_on_compute`.

    Raises:
        ValueError, QScorerError: see `QScorerLoss`.

    Example:
        >>> score = QScore(device="cpu")
        >>> score.update(torch.rand(2, 3, 64, 64))
        >>> score.update(torch.randint(0, 256, (1, 3, 80, 64), dtype=torch.uint8))
        >>> score.compute().shape, int(score.images)
        (torch.Size([]), 3)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 5.0

    total: Tensor
    images: Tensor

    def __init__(
        self,
        metric: str | QScorer | None = None,
        device: str | torch.device | None = None,
        metric_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        loss = QScorerLoss(metric, device=device, **(metric_options or {}))
        self._held = (loss,)  # in a tuple, it is no submodule: neither its weights nor its name enter `state_dict`
        self.to(next(loss.parameters()).device)

    def update(self, images: Tensor) -> None:
        """Take in (B, 3 or 1, H, W) images, uint8 or floating point in [0, 1]; values a little outside are clamped.

        Raises:
            ImageError: another shape, type or scale, NaN or infinite values; nothing of the batch counts then.
        """
        if images.dtype == torch.uint8:
            images = images.float() / 255
        scores = self._held[0].rewards(images)
        self.total += scores.sum(dtype=torch.float64)
        self.images += len(scores)

    def compute(self) -> Tensor:
        """Mean score (), float32; NaN before the first image."""
        return (self.total / self.images).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        moved = super()._apply(fn, *args, **kwargs)
        self._held[0].to(self.device)  # never of another type: torchmetrics' own states keep theirs, too
        return moved
