"""Vision encoder of small models: a pretrained convolutional network whose layers are read as statistics of cells.

What tells quality in a convolutional network are low and middle layers: how strong their responses are, and how evenly
they are spread. Each cell of a grid becomes a patch token from the mean and the standard deviation of every channel in
it; the whole picture becomes the cls token in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from threading import Barrier
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ..images.preprocessing import MEAN, STD
from .configuration import QScorerVisionConfig
from .fast_convolution import make_fast, under_transform

SMALLEST_VARIANCE = 1e-6  # keeps the gradient of the standard deviation finite in flat cells


class Standardise(nn.Module):
    """(x - mean) / scale per channel; both are statistics of the training data, not trained."""

    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    def forward(self, values: Tensor) -> Tensor:
        """In the dtype of the values: in 16 bit a mean far above its scale would leave few digits of the difference."""
        return (values - self.mean.to(values.dtype)) / self.scale.to(values.dtype)


class FeatureEncoder(nn.Module):
    """(B, 3, image_size, image_size) pixels -> (B, 1 + cells, width), cls token first.

    The batch norms of the feature network are part of its convolutions, also in training.
    """

    backbone: Any

    def __init__(self, config: QScorerVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.indices = list(config.stages)
        self.backbone = self.new_backbone()
        fold_batch_norms(self.backbone)
        stages = [self.backbone.feature_info[index] for index in self.indices]
        for stage in stages:
            if config.patch_size % stage["reduction"]:
                raise ValueError(
                    f"vision_config.patch_size must be a multiple of {stage['reduction']}, the pixels that one value "
                    f"of {config.backbone}'s stage {stage['module']} stands for, got {config.patch_size}"
                )
        channels = 2 * sum(stage["num_chs"] for stage in stages)
        self.standardise = Standardise(channels)
        self.patch_projection = nn.Linear(channels, config.hidden_size)
        self.cls_projection = nn.Linear(channels, config.hidden_size)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def new_backbone(self) -> Any:
        """timm's network up to the last stage that is read, with random weights and its batch norms as layers."""
        assert self.config.backbone is not None  # by the configuration
        network: Any = timm.create_model(self.config.backbone, num_classes=0, pretrained=False).eval()
        if self.config.stages[-1] >= len(network.feature_info):
            raise ValueError(
                f"vision_config: {self.config.backbone} has stages 0 to {len(network.feature_info) - 1}, "
                f"got {list(self.config.stages)}"
            )
        network.prune_intermediate_layers(list(self.config.stages), prune_norm=True, prune_head=True)
        return network

    def train(self, mode: bool = True) -> FeatureEncoder:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tokens of normalised pixels (B, 3, S, S), or of their `statistics` (B, 1 + cells, channels).

        Raises:
            ValueError: another shape.
        """
        statistics = pixel_values if pixel_values.ndim == 3 else self.statistics(pixel_values)
        wanted = (1 + (self.config.image_size // self.config.patch_size) ** 2, len(self.standardise.mean))
        if statistics.shape[1:] != wanted:
            raise ValueError(f"statistics must have shape (B, {wanted[0]}, {wanted[1]}), got {tuple(statistics.shape)}")
        values = self.standardise(statistics).to(self.patch_projection.weight.dtype)
        cls_token = self.cls_projection(values[:, :1])
        tokens = torch.cat([cls_token, self.patch_projection(values[:, 1:])], dim=1)
        return self.post_layernorm(tokens)

    def statistics(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pixels -> (B, 1 + cells, channels): whole picture, then cells row by row.

        Channels are the means of all layers' channels, then their standard deviations; float32, float64 for float64.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values must have shape (B, 3, {size}, {size}), got {tuple(pixel_values.shape)}")
        if pixel_values.device.type == "cpu" and len(pixel_values) > 1 and not torch.is_grad_enabled():
            return torch.cat(each_on_one_thread(self.statistics, pixel_values.split(1)))
        grid = size // self.config.patch_size
        # Convolutions of this kind run three times faster on the CPU with channels last.
        pixels = self._renormalised(pixel_values).contiguous(memory_format=torch.channels_last)
        layers = self.layers(self.backbone, pixels)
        means, deviations = [], []
        for layer in layers:
            wide = layer if layer.dtype == torch.float64 else layer.float()  # squares overflow in half precision
            mean, square = adaptive_avg_pool2d(wide, grid), adaptive_avg_pool2d(wide * wide, grid)
            moments = [torch.cat([m.mean((2, 3))[:, None], m.flatten(2).transpose(1, 2)], 1) for m in (mean, square)]
            means.append(moments[0])
            deviations.append((moments[1] - moments[0] ** 2).clamp(min=0).add(SMALLEST_VARIANCE).sqrt())
        return torch.cat(means + deviations, dim=-1)

    def columns_of(self, stages: Sequence[int]) -> list[int]:
        """Where the means and deviations of some of the stages stand among the channels of `statistics`."""
        widths = [self.backbone.feature_info[index]["num_chs"] for index in self.indices]
        ends = list(accumulate([0, *widths, *widths]))
        parts = zip(self.indices * 2, pairwise(ends), strict=True)
        return [column for index, part in parts if index in stages for column in range(*part)]

    def layers(self, backbone: Any, pixels: Tensor) -> list[Tensor]:
        """Outputs of the stages that are read, of this encoder's network or another of its kind."""
        settings = {"indices": self.indices, "stop_early": True, "intermediates_only": True}
        return list(backbone.forward_intermediates(pixels, **settings))

    def _renormalised(self, pixel_values: Tensor) -> Tensor:
        """From the normalisation of Q-Scorer's pixels to the one that the feature network was trained with."""
        wanted = self.backbone.pretrained_cfg
        channels = list(zip(MEAN, STD, wanted["mean"], wanted["std"], strict=True))
        factor = pixel_values.new_tensor([std / wanted_std for _, std, _, wanted_std in channels])
        offset = pixel_values.new_tensor([(mean - other) / std for mean, _, other, std in channels])
        return pixel_values * factor[:, None, None] + offset[:, None, None]


def each_on_one_thread(compute: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """`compute` of every part without gradients, side by side on as many threads as PyTorch may use, one for each part.

    Two threads for one image are hardly faster than one; and a batch in one piece is slower than its images one by one,
    since feature maps of that size are given back to the system and fetched again at every layer. What is set for the
    calling thread only, autocast or a transform of `torch.func`, would not reach the others: then one after the other.
    """
    before = torch.get_num_threads()
    threads = min(before, len(parts))
    if threads == 1 or torch.is_autocast_enabled("cpu") or under_transform(parts[0]):
        return [compute(part) for part in parts]
    ready = Barrier(threads + 1, timeout=60)

    def start() -> None:
        torch.get_num_threads()  # at its first use in a thread PyTorch sets the number that was set last
        torch.set_num_threads(1)  # holds for this thread, but new ones would take it over
        ready.wait()

    def one(part: Tensor) -> Tensor:
        with torch.no_grad():  # of the calling thread
            return compute(part)

    with ThreadPoolExecutor(threads, "qscorer-statistics", start) as pool:
        computed = pool.map(one, parts)
        ready.wait()
        torch.set_num_threads(before)
        return list(computed)


def fold_batch_norms(network: nn.Module) -> None:
    """Make every batch norm of `network` part of the convolution before it, which gets a bias; in place.

    As a layer it reads and writes every feature map once more, which costs more than half of a small network's time on
    the CPU; the convolutions become fast ones. The network computes afterwards what it computed in evaluation mode.
    Activations that timm keeps inside of its batch norms stay. Where a norm's convolution stands is told by the order
    of registration, as in all networks of the form convolution, norm, activation.

    Raises:
        ValueError: a batch norm that does not come right after a convolution with as many channels.
    """
    convolution: nn.Conv2d | None = None
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d):
            convolution = module
        elif isinstance(module, nn.BatchNorm2d):
            if convolution is None or convolution.out_channels != module.num_features:
                raise ValueError(f"batch norm {name} does not come right after a convolution of its channels")
            _fold(convolution, module)
            network.set_submodule(name, make_fast(convolution, getattr(module, "act", nn.Identity())))
            convolution = None


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None and norm.running_var is not None  # timm's networks track them
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        offset = -norm.running_mean.double()
        if convolution.bias is not None:
            offset = offset + convolution.bias.double()
        offset = offset * scale
        if norm.affine:
            scale, offset = scale * norm.weight.double(), offset * norm.weight.double() + norm.bias.double()
        kernel = convolution.weight
        convolution.weight.copy_((kernel.double() * scale[:, None, None, None]).to(kernel.dtype))
        convolution.bias = nn.Parameter(offset.to(kernel.dtype))
