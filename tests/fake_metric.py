"""A quick stand-in for the model. Run as a program it is the command line with that stand-in as its metric."""

import os
import time
from typing import Any

import torch
from torch import Tensor, nn

from pyiqa_qscorer.errors import QScorerError


class FakeMetric(nn.Module):
    """Scores that depend on all pixels of an image and on no other image; counts its batches.

    Args:
        seconds_per_image: how slow it is.
        refuse: refuse a batch that holds an image with a score above this, as `QScorer` does with infinite scores.
    """

    image_size = 56

    def __init__(
        self, *, identity: str = "0123456789abcdef" * 4, seconds_per_image: float = 0.0, refuse: float = 99.0
    ) -> None:
        super().__init__()
        self.identity = identity
        self.seconds_per_image = seconds_per_image
        self.refuse = refuse
        self.batches: list[int] = []
        self.weight = nn.Parameter(torch.linspace(0.2, 1.8, 3 * 56 * 56).view(3, 56, 56))

    def score_pixels(self, pixel_values: Tensor) -> Tensor:
        self.batches.append(len(pixel_values))
        time.sleep(self.seconds_per_image * len(pixel_values))
        assert pixel_values.dtype == torch.float32 and pixel_values.shape[1:] == (3, 56, 56)
        assert not torch.is_grad_enabled()
        scores = [2.5 + (image * self.weight).double().mean() for image in pixel_values]
        if max(scores) > self.refuse:
            raise QScorerError("the model gave scores that are not finite")
        return torch.stack(scores).float()


def use(name: str, options: dict[str, Any], device: torch.device) -> FakeMetric:
    """Takes the place of `scoring.build_metric`; the prompt is the one option that changes the identity."""
    identity = f"{options.get('prompt') or 'plain':0<64}"
    return FakeMetric(identity=identity, seconds_per_image=float(os.environ.get("FAKE_SECONDS_PER_IMAGE", "0")))


if __name__ == "__main__":
    from pyiqa_qscorer import scorer as scoring
    from pyiqa_qscorer.cli import app as cli

    scoring.build_metric = use  # type: ignore[assignment]
    cli.main()
