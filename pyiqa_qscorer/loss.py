"""`QScorerLoss`: perceptual quality as a training loss or a reward, without a reference image."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import ImageError
from .metric import QScorer
from .registry import SCORE_RANGE, default_metric, resolve_metric_options
from .scorer import resolve_device

REDUCTIONS = ("none", "mean", "sum")


class QScorerLoss(nn.Module):
    """How far the quality of images is from what it should be; lower is better.

    Per image, with its score in [0, 5] (higher is better):

    - no `target`: minus the score, in [-5, 0];
    - `target`: target - score, in [target - 5, target]; the same gradient, shifted to be easier to read;
    - `target` and `hinge`: max(0, target - score), in [0, target]; no gradient to an image that is good enough, which
      limits how far the metric can be exploited.

    The reduction of these values is multiplied by `loss_weight`. With `clamp=False` the ranges have no ends.

    The metric is frozen and stays in eval mode: no parameter of it is trained or gets a gradient, and the loss can be
    a part of a module that trains.

    Args:
        metric: A name of `pyiqa_qscorer.METRICS`; or a built `QScorer`, which is frozen and stays where it is.
            Default `qscorer-mini`; with `checkpoint` (and no metric) `qscorer`.
        loss_weight: Factor of the result. A negative one would reward bad images, and is refused.
        reduction: `mean`, `sum` or `none` (one value per image) over the batch.
        target: Score to reach, in [0, 5]. None: as high as can be.
        hinge: No loss beyond `target`.
        device: Where the metric runs; default CUDA where there is one, else CPU. `.to(device)` moves it.
        **options: Those of `QScorer` (checkpoint, dtype, gradient_checkpointing, ...); only with a name.

    Raises:
        ValueError: An argument outside its range.
        QScorerError: Unknown name or option, a device that does not exist, a faulty checkpoint.

    Example:
        >>> images = torch.rand(2, 3, 64, 64, requires_grad=True)
        >>> QScorerLoss("qscorer-mini", loss_weight=0.1, target=4.5, hinge=True, device="cpu")(images).backward()
        >>> images.grad.shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(
        self,
        metric: str | QScorer | None = None,
        loss_weight: float = 1.0,
        reduction: str = "mean",
        target: float | None = None,
        hinge: bool = False,
        device: str | torch.device | None = None,
        gradient_checkpointing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        self.loss_weight = _number("loss_weight", loss_weight, 0, math.inf)
        self.target = None if target is None else _number("target", target, *SCORE_RANGE)
        if hinge and target is None:
            raise ValueError("hinge needs the target beyond which there is no loss, got target None; give target=4.5")
        self.reduction = reduction
        self.hinge = hinge
        if metric is None:
            metric = default_metric(options.get("checkpoint"))
        if isinstance(metric, str):
            where = resolve_device(device)
            chosen = resolve_metric_options(metric, options)
            self.metric = QScorer(**chosen, device=where, gradient_checkpointing=gradient_checkpointing).to(where)
        elif isinstance(metric, QScorer):
            if options or gradient_checkpointing:
                given = sorted([*options, *(["gradient_checkpointing"] if gradient_checkpointing else [])])
                raise ValueError(f"{', '.join(given)}: options go with a metric name, give them to QScorer(...)")
            self.metric = metric if device is None else metric.to(resolve_device(device))
        else:
            raise ValueError(f"metric must be a metric name or a QScorer, got {type(metric).__name__}")
        self.metric.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> QScorerLoss:
        super().train(mode)
        self.metric.eval()
        return self

    def extra_repr(self) -> str:
        return f"loss_weight={self.loss_weight}, reduction={self.reduction!r}, target={self.target}, hinge={self.hinge}"

    def forward(self, images: Tensor, reference: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            images: (B, 3 or 1, H, W), floating point, RGB. Values outside [0, 1] are clamped; their gradient is what
                moves them back, see `preprocessing.pixels_from_tensor`. Not of another scale, such as 0..255.
            reference: Not used. There because trainers call every loss as `loss(output, ground_truth)`.

        Returns:
            float32, () or, with `reduction="none"`, (B,). Differentiable in `images`.

        Raises:
            ImageError: Another shape or type; NaN or infinite values, or values that are on average further outside
                [0, 1] than 1, which no overshoot of an optimiser is.
        """
        if images.ndim == 4 and min(images.shape[-2:]) < self.metric.smallest_side:
            raise ImageError(
                f"images must have at least {self.metric.smallest_side} pixels on each side for this model to judge "
                f"them, got {images.shape[-2]} x {images.shape[-1]}; train on larger crops"
            )
        losses = -self.metric.score_images(images, clamp_images=True)
        if self.target is not None:
            losses = losses + self.target
        if self.hinge:
            losses = losses.relu()
        if self.reduction == "mean":
            losses = losses.mean()
        elif self.reduction == "sum":
            losses = losses.sum()
        return self.loss_weight * losses

    @torch.no_grad()
    def rewards(self, images: Tensor) -> Tensor:
        """Scores (B,) of a batch as `forward` takes it, float32 in [0, 5], higher is better; no gradient.

        Whatever `loss_weight`, `target` and `hinge` say: for policy gradients, best-of-n choices and logs.
        """
        return self.metric.score_images(images, clamp_images=True)


def _number(name: str, value: object, low: float, high: float) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= cast("float", value) <= high or not math.isfinite(cast("float", value)):
        ends = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"finite and at least {low:g}"
        raise ValueError(f"{name} must be a number {ends}, got {value!r}")
    return float(cast("float", value))
