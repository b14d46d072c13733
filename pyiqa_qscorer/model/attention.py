"""What the three transformers of the network share: the attention call, the stack of layers, their recomputation.

The kernel is looked up by name in transformers' attention interface, so `sdpa`, `flash_attention_2` and whatever the
user registers there work. `eager` is ours, because the published parts differ in where they round.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class AttentionModule(Protocol):
    """What transformers' kernels read from the module that they work for."""

    config: Any
    scaling: float
    is_causal: bool


class LayerStack(nn.Module):
    """Holds layers under the name `layers`, where the published checkpoints have them."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def eager_attention(
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Plain softmax attention, (B, heads, T, head_dim) -> (B, T, heads, head_dim).

    The decoder's softmax runs in float32, that of the visual parts in the working dtype, as published.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    softmax_dtype = torch.float32 if module.is_causal and scores.dtype != torch.float64 else None
    weights = torch.softmax(scores, dim=-1, dtype=softmax_dtype).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attend(module: AttentionModule, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Attention of (B, heads, T, head_dim) tensors, heads merged: (B, T, heads * head_dim)."""
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    output, _ = kernel(module, query, key, value, attention_mask, dropout=0.0, scaling=module.scaling)
    return output.reshape(*output.shape[:2], -1)


KERNELS_FOR_LAST = ("eager", "sdpa", "flash_attention_2")  # those that `mask_of_last` knows


def mask_of_last(mask: Any, last: int, keys: int, implementation: str, device: torch.device) -> Any:
    """The causal mask of all tokens, as transformers makes it for a kernel, reduced to the `last` ones, which ask.

    It is (B or 1, 1, T, keys), or None where the kernel does without.
    """
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return mask[:, :, -last:]
    if mask is None and implementation == "sdpa":
        # PyTorch's own causal flag takes the first tokens for those that ask.
        return torch.ones(last, keys, dtype=torch.bool, device=device).tril(keys - last)[None, None]
    return mask  # flash attention: lines up the ends by itself


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(B, T, width) -> (B, heads, T, width / heads), contiguous split as published."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def enable_gradient_checkpointing(model: Any) -> None:
    """Have the layers of a network, adapters included, recomputed in the backward pass.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    layers = getattr(model, "base", model)  # of a `VlmQScorer`
    # The name changed within transformers 5.
    renamed = getattr(layers, "activation_checkpointing_enable", None)
    (renamed or layers.gradient_checkpointing_enable)({"use_reentrant": False})
    vision = getattr(getattr(model, "model", None), "vision_model", None)  # of the published network
    backbone = getattr(vision, "backbone", None)
    if backbone is not None:
        backbone.set_grad_checkpointing(True)  # a network of timm, which does it itself


def checkpoint_in_eval_mode(model: nn.Module) -> None:
    """Have layers recomputed outside of training too: transformers asks for the layer's own `training` flag.

    The flags of what is inside a layer, which decide how it computes, stay as they are.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
