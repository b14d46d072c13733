"""Pillow's bicubic resize as a matrix: built once per size and device, the same numbers as Pillow's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def resize_matrix(in_size: int, out_size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Pillow's bicubic filter as float64 (out_size, in_size), each entry a multiple of 2^-22."""
    scale = in_size / out_size
    stretch = max(scale, 1.0)  # antialiasing: the kernel widens when the image shrinks
    centers = (np.arange(out_size) + 0.5) * scale
    starts = np.maximum((centers - 2 * stretch + 0.5).astype(np.int64), 0)
    ends = np.minimum((centers + 2 * stretch + 0.5).astype(np.int64), in_size)
    taps = starts[:, None] + np.arange((ends - starts).max())
    inside = taps < ends[:, None]

    a = -0.5
    x = np.abs((taps - centers[:, None] + 0.5) * (1.0 / stretch))
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0)) * inside
    weights /= weights.cumsum(axis=1)[:, -1:]  # Pillow adds one by one; sum() adds in pairs
    fixed = np.trunc(weights * 2**22 + np.copysign(0.5, weights))

    matrix = np.zeros((out_size, in_size))
    rows, columns = inside.nonzero()
    matrix[rows, taps[rows, columns]] = fixed[rows, columns] / 2**22
    return matrix


# A traced call takes what depends on sizes and devices only as constants, and must not fill caches, where torch.export
# would leave fake tensors.


@torch.compiler.assume_constant_result
def resize_matrix_on(in_size: int, out_size: int, device: torch.device) -> torch.Tensor:
    return cached_unless_tracing(build_matrix)(in_size, out_size, device)


def cached_unless_tracing(build: functools._lru_cache_wrapper[Any]) -> Callable[..., Any]:
    return build.__wrapped__ if torch.compiler.is_compiling() else build


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # autograd refuses cached tensors born in inference mode
def build_matrix(in_size: int, out_size: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(resize_matrix(in_size, out_size)).to(device)
