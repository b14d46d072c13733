"""Train a small denoiser with L1 and the quality score as losses."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

from pyiqa_qscorer import QScorerLoss

PHOTOS = Path(__file__).resolve().parents[1] / "tests" / "photos"


def main() -> None:
    torch.manual_seed(0)
    photos = [Image.open(PHOTOS / name).convert("RGB") for name in ("astronaut.jpg", "cat.jpg", "coffee.jpg")]
    clean = torch.stack([to_tensor(photo)[:, :192, :192] for photo in photos])  # (B, 3, H, W) in [0, 1]
    noisy = (clean + 0.1 * torch.randn_like(clean)).clamp(0, 1)

    denoiser = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))
    nn.init.zeros_(denoiser[2].weight)  # at first it changes nothing
    # Lower is better: target - score, and nothing beyond the target, which limits how far the metric can be fooled.
    quality = QScorerLoss("qscorer-mini", loss_weight=0.01, target=4.5, hinge=True, device="cpu")
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=5e-3)
    for step in range(10):
        restored = noisy + denoiser(noisy)  # may leave [0, 1] a little: the gradient leads back
        l1 = (restored - clean).abs().mean()
        loss = l1 + quality(restored)  # L1 keeps the content, without it the score alone would be optimised
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        # rewards: scores without a gradient, for logs and for best-of-n choices.
        print(f"step {step}: L1 {l1.item():.4f}, mean score {quality.rewards(restored).mean().item():.3f}")


if __name__ == "__main__":
    main()
