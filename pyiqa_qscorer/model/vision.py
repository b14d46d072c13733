"""Vision encoder: the published ViT (pre-norm, quick-GELU, fused and interleaved query/key/value)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import LayerStack, attend
from .configuration import QScorerVisionConfig


class VisionEmbeddings(nn.Module):
    """(B, 3, S, S) pixels -> (B, 1 + (S/patch)^2, width): cls token, patches, positions, norm."""

    def __init__(self, config: QScorerVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        tokens = 1 + (config.image_size // patch) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(1, tokens, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype)
        embeddings = torch.cat([cls_token, patches], dim=1)
        return self.pre_layernorm(embeddings + self.position_embedding.to(patches.dtype))


class VisionAttention(nn.Module):
    def __init__(self, config: QScorerVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.scaling = (config.hidden_size // self.heads) ** -0.5
        self.is_causal = False
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        # Rows are grouped by head (q, k, v of head 0, then of head 1, ...), not [all q; all k; all v].
        mixed = self.query_key_value(hidden_states).unflatten(-1, (self.heads, 3, -1))
        query, key, value = mixed.permute(3, 0, 2, 1, 4)
        return self.dense(attend(self, query, key, value, None))


class VisionMLP(nn.Module):
    def __init__(self, config: QScorerVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(hidden_states)))


def quick_gelu(states: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return states * torch.sigmoid(1.702 * states)
    # In place: on the CPU fresh memory for tensors of this size costs more than the arithmetic.
    return (1.702 * states).sigmoid_().mul_(states)


class VisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: QScorerVisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class VisionEncoder(nn.Module):
    """(B, 3, image_size, image_size) pixels -> (B, 1 + patches, width), cls token first."""

    def __init__(self, config: QScorerVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = LayerStack(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        size = self.config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values must have shape (B, 3, {size}, {size}), got {tuple(pixel_values.shape)}")
        hidden_states = self.embeddings(pixel_values)
        for layer in self.encoder.layers:
            hidden_states = layer(hidden_states)
        return self.post_layernorm(hidden_states)
