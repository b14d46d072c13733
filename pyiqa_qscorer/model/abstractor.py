"""Visual abstractor: learned queries cross-attend to the patch tokens, then a projector to the decoder's width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import LayerStack, attend, split_heads
from .configuration import QScorerAbstractorConfig


def sine_table(positions: Tensor, width: int) -> Tensor:
    """(P,) positions -> (P, width) rows [sin(p w), cos(p w)], w_j = 10000^(-j / (width/2)), float32 as published."""
    frequencies = 1.0 / 10000 ** (torch.arange(width // 2, dtype=torch.float32) / (width / 2))
    angles = torch.outer(positions.float(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def key_position_table(grid_size: int, width: int) -> Tensor:
    """(1 + grid_size^2, width): zeros for the cls token, then column and row halves of each cell, row-major."""
    cells = torch.arange(grid_size)
    columns = sine_table(cells.repeat(grid_size), width // 2)
    rows = sine_table(cells.repeat_interleave(grid_size), width // 2)
    return torch.cat([torch.zeros(1, width), torch.cat([columns, rows], dim=1)])


class CrossAttention(nn.Module):
    """Queries attend to queries and patch tokens together; positions enter queries and keys, not values."""

    q_pos_embed: Tensor
    k_pos_embed: Tensor

    def __init__(self, config: QScorerAbstractorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.scaling = (width // self.heads) ** -0.5
        self.is_causal = False
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        # Persistent, because a checkpoint brings its own (usually rounded) copy, which wins.
        query_table, key_table = self.position_tables()
        self.register_buffer("q_pos_embed", query_table)
        self.register_buffer("k_pos_embed", key_table)

    def position_tables(self) -> tuple[Tensor, Tensor]:
        """The tables (Q, width) and (1 + grid^2, width) that a checkpoint without its own copy gets."""
        width = self.config.hidden_size
        queries = torch.arange(self.config.num_learnable_queries)
        return sine_table(queries, width), key_position_table(self.config.grid_size, width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        query_positions = self.q_pos_embed.to(queries.dtype)
        key_positions = torch.cat([query_positions, self.k_pos_embed.to(queries.dtype)])
        query = split_heads(self.query(queries + query_positions), self.heads)
        key = split_heads(self.key(tokens + key_positions), self.heads)
        value = split_heads(self.value(tokens), self.heads)
        return attend(self, query, key, value, None)


class GatedMLP(nn.Module):
    def __init__(self, config: QScorerAbstractorConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_ln = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = silu(self.w1(hidden_states)) * self.w3(hidden_states)
        return self.w2(self.ffn_ln(gated))


class CrossAttentionOutput(nn.Module):
    def __init__(self, config: QScorerAbstractorConfig) -> None:
        super().__init__()
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = GatedMLP(config)

    def forward(self, context: Tensor, residual: Tensor) -> Tensor:
        hidden_states = residual + self.out_proj(context)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class CrossAttentionBlock(nn.Module):
    # norm1, normk and norm2 have PyTorch's default eps 1e-5, not the configured one: as published.
    def __init__(self, config: QScorerAbstractorConfig) -> None:
        super().__init__()
        self.attention = CrossAttention(config)
        self.normk = nn.LayerNorm(config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.output = CrossAttentionOutput(config)

    def forward(self, queries: Tensor, image_tokens: Tensor) -> Tensor:
        normed = self.norm1(queries)
        tokens = torch.cat([normed, self.normk(image_tokens)], dim=1)
        return self.output(self.attention(normed, tokens), residual=normed)


class AbstractorLayer(GradientCheckpointingLayer):
    def __init__(self, config: QScorerAbstractorConfig) -> None:
        super().__init__()
        self.crossattention = CrossAttentionBlock(config)

    def forward(self, queries: Tensor, image_tokens: Tensor) -> Tensor:
        return self.crossattention(queries, image_tokens)


class VisualAbstractor(nn.Module):
    """(B, 1 + patches, width) image tokens -> (B, queries + 1, decoder width) visual tokens."""

    def __init__(self, config: QScorerAbstractorConfig, output_size: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.query_embeds = nn.Parameter(torch.empty(1, config.num_learnable_queries, width))
        self.encoder = LayerStack(AbstractorLayer(config) for _ in range(config.num_hidden_layers))
        self.visual_fc = nn.Linear(width, output_size)
        self.vit_eos = nn.Parameter(torch.empty(1, 1, output_size))

    def forward(self, image_tokens: Tensor) -> Tensor:
        batch = image_tokens.shape[0]
        queries = self.query_embeds.to(image_tokens.dtype).expand(batch, -1, -1)
        for layer in self.encoder.layers:
            queries = layer(queries, image_tokens)
        visual_tokens = self.visual_fc(queries)
        end_token = self.vit_eos.to(visual_tokens.dtype).expand(batch, -1, -1)
        return torch.cat([visual_tokens, end_token], dim=1)
