"""Gradient checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016) of the layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def enable_gradient_checkpointing(model: Any) -> None:
    """Have the layers of a transformers model, adapters included, recomputed in the backward pass."""
    # The name changed within transformers 5.
    renamed = getattr(model, "activation_checkpointing_enable", None)
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
    backbone = getattr(model.get_submodule("model.vision_model"), "backbone", None)
    if backbone is not None:
        backbone.set_grad_checkpointing(True)  # a network of timm, which does it itself


def checkpoint_in_eval_mode(model: nn.Module) -> None:
    """Have them recomputed outside of training too: transformers asks for the layer's own `training` flag.

    The flags of what is inside a layer, which decide how it computes, stay as they are.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
