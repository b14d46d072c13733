"""Trained parameters of a model by name: which they are, and their values to and from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that are not frozen."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def set_parameters(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy each parameter's value, of any dtype and device, into it."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def save_values(values: Mapping[str, Tensor], file: Path) -> None:
    """Write values as safetensors, from wherever they are."""
    save_file({name: value.contiguous().cpu() for name, value in values.items()}, file)
