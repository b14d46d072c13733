"""Convolutions on the CPU in float32: through oneDNN, with the padding and the activation in the same pass.

A feature network spends a third of its time on copies that are padded by one row, on clamping, and on fetching memory
for both. PyTorch also takes another library for 1 x 1 kernels when there is one thread, which rounds otherwise; these
compute the same bits with any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from .fast_linear import is_float32_on_cpu

# Not public, but what torch.compile has called for every fused convolution on the CPU since PyTorch 2.0.
_onednn = getattr(torch.ops.mkldnn, "_convolution_pointwise", None) if torch.backends.mkldnn.is_available() else None
# By the class of an activation: its name in oneDNN, and the numbers that go with it.
FUSED: dict[type[nn.Module], tuple[str, list[float]]] = {nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0])}


class FastConvolution(nn.Conv2d):
    """`nn.Conv2d`, or timm's `Conv2dSame` where `same`, and the `activation` after it.

    In float32 on the CPU by oneDNN, without gradients in one pass; everything else is what PyTorch does.
    """

    same: bool
    activation: nn.Module | None

    def forward(self, input: Tensor) -> Tensor:
        step, kernel = self.stride[0], self.kernel_size[0]
        surplus = max(kernel - step, 0)  # rows that "same" pads, where the stride divides the size
        fits = not self.same or all(side % step == 0 for side in input.shape[2:])
        if not (fits and _suits_onednn(input, self.weight)):
            if self.same:
                input = pad_same(input, list(self.kernel_size), list(self.stride), list(self.dilation))
            output = self._conv_forward(input, self.weight, self.bias)
            return output if self.activation is None else self.activation(output)
        weight, padding = self.weight, list(self.padding)
        if self.same:
            # One row more at the far side is one row of zeros at the near side of the kernel.
            padding, odd = [surplus - surplus // 2] * 2, surplus % 2
            weight = F.pad(weight, (odd, 0, odd, 0)) if odd else weight
        if torch.is_grad_enabled():  # the same bits in two passes, since the fused one has no gradient
            convolve: Any = torch.mkldnn_convolution
            output = convolve(input, weight, self.bias, padding, self.stride, self.dilation, self.groups)
            return output if self.activation is None else self.activation(output)
        name, numbers = ("none", []) if self.activation is None else FUSED[type(self.activation)]
        result: Tensor = _onednn(  # type: ignore[misc]
            input, weight, self.bias, padding, self.stride, self.dilation, self.groups, name, numbers, ""
        )
        return result


def make_fast(convolution: nn.Conv2d, activation: nn.Module) -> nn.Module:
    """Make `convolution` a `FastConvolution`, in place, with `activation` if oneDNN has it.

    Parameters and their names stay. Returns what is left to apply after it.
    """
    kind = type(convolution)
    square = len({*convolution.kernel_size}) == len({*convolution.stride}) == 1 and set(convolution.dilation) == {1}
    if kind not in (nn.Conv2d, Conv2dSame) or not square or isinstance(convolution.padding, str):
        return activation
    fused = activation if type(activation) in FUSED else None
    convolution.__class__ = FastConvolution
    convolution.same, convolution.activation = kind is Conv2dSame, fused  # type: ignore[assignment]
    return activation if fused is None else nn.Identity()


def _suits_onednn(input: Tensor, weight: Tensor) -> bool:
    return (
        _onednn is not None
        and is_float32_on_cpu(input, weight)
        and not torch.compiler.is_compiling()
        and not under_transform(input)
    )


def under_transform(tensor: Tensor) -> bool:
    """Whether a function transform of `torch.func` holds the tensor."""
    found: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return found
