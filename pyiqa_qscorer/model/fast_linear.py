"""Linear layers on the CPU in float32: through oneDNN, which is up to 2.3 times as fast as PyTorch's default there.

PyTorch hands float32 products on x86 to MKL, which keeps to AVX2 on processors of other makers; oneDNN, which PyTorch
brings along and uses for 16-bit types, takes AVX-512 wherever there is. The products are the same up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Not public, but what torch.compile has called for every fused linear layer on the CPU since PyTorch 2.0.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class FastLinear(nn.Linear):
    """`nn.Linear` whose float32 products on the CPU go through oneDNN; everything else is that of the base class.

    `torch.backends.mkldnn.flags(enabled=False)` turns it off.
    """

    def forward(self, input: Tensor) -> Tensor:
        if _suits_onednn(input, self.weight):
            return onednn_linear(input, self.weight, self.bias)
        return super().forward(input)


def use_fast_linear(model: nn.Module) -> None:
    """Make every plain `nn.Linear` of `model` with more than one output a `FastLinear`, in place.

    To be called once a model is complete: transformers' quantisers replace layers of exactly the class `nn.Linear`.
    Adapters of peft wrap either class. Parameters and their names stay.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features > 1:
            module.__class__ = FastLinear


def onednn_linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of float32 CPU tensors by oneDNN, (..., in) -> (..., out); differentiable."""
    needs_gradient = torch.is_grad_enabled() and (
        states.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    output: Tensor = (_OneDnnLinear.apply if needs_gradient else _forward)(states, weight, bias)
    return output


def _suits_onednn(states: Tensor, weight: Tensor) -> bool:
    return (
        _onednn is not None
        and is_float32_on_cpu(states, weight)
        and states.ndim > 1
        and states.numel() > 0
        and not (torch.compiler.is_compiling() and torch.is_grad_enabled())
    )


def is_float32_on_cpu(states: Tensor, weight: Tensor) -> bool:
    """Whether a layer computes in float32 on the CPU, and oneDNN may do it."""
    return (
        states.device.type == "cpu"
        and states.dtype == weight.dtype == torch.float32
        and (torch.compiler.is_compiling() or torch._C._get_mkldnn_enabled())
        and not torch.is_autocast_enabled("cpu")
    )


def _forward(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # torch.compile would take the product for one of its own, which it allows with constant weights only.
    output: Tensor = (_opaque if torch.compiler.is_compiling() else _call)(states, weight, bias)
    return output


def _call(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = _onednn(states, weight, bias, "none", [], "")  # type: ignore[misc]
    return output


_opaque = torch.library.custom_op(
    "pyiqa_qscorer::onednn_linear",
    _call,
    mutates_args=(),
    schema="(Tensor states, Tensor weight, Tensor? bias) -> Tensor",
)


@_opaque.register_fake
def _shape(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return states.new_empty(*states.shape[:-1], weight.shape[0])


class _OneDnnLinear(torch.autograd.Function):
    """Its backward pass is made of the same products, so it can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _forward(states, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        states, weight = ctx.saved_tensors
        rows, (of_states, of_weight, of_bias) = gradient.flatten(0, -2), ctx.needs_input_grad
        return (
            onednn_linear(gradient, weight.t()) if of_states else None,
            # Of a slice such as `states[:, 0]`, transposed, oneDNN makes the product a thousand times slower.
            onednn_linear(rows.t(), states.flatten(0, -2).contiguous().t()) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )
