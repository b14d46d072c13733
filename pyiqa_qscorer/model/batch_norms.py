"""Batch norms of a pretrained network made part of the convolutions before them.

With fixed statistics a batch norm is one factor and one offset per channel. Left as a layer of its own it reads and
writes every feature map once more, which costs more than half of a small network's time on the CPU.
"""

from __future__ import annotations

import torch
from torch import nn


def fold_batch_norms(network: nn.Module) -> None:
    """Make every batch norm of `network` part of the convolution before it, which gets a bias; in place.

    The network computes afterwards what it computed in evaluation mode. Activations that timm keeps inside of its batch
    norms stay. Where a norm's convolution stands is told by the order of registration, as in all networks of the form
    convolution, norm, activation.

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
            network.set_submodule(name, getattr(module, "act", nn.Identity()))
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
