"""Modality-adaptive decoder: a LLaMA-2 whose norms, keys and values have a copy for text and one for visual tokens.

Written out here instead of deriving from transformers' Llama classes, because pyiqa's own code replaces those for
the whole process.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import KERNELS_FOR_LAST, attend, mask_of_last, split_heads
from .configuration import QScorerConfig
from .multiway import NO_VISUAL, Multiway, VisualSpan

# Its name changed within transformers 5; the old one warns in every process that scores.
CACHE_ARGUMENT = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"


class RMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to the input dtype, then times the weight (that order, as published)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        wide = states.double() if states.dtype == torch.float64 else states.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(states.dtype)


def rotary_tables(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """(B or 1, T) positions -> (2, B or 1, 1, T, head_dim) cosines and sines, computed in float32.

    Built on every call (93 x 64 numbers): a stored table would have to survive meta-device loading and dtype moves.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / base ** (exponents / head_dim)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotate(states: Tensor, rotary: Tensor) -> Tensor:
    """Rotary position embedding of (B, heads, T, head_dim), half-split pairs."""
    first, second = states.chunk(2, dim=-1)
    cosines, sines = rotary
    rotated = states * cosines + torch.cat([-second, first], dim=-1) * sines
    return rotated.to(states.dtype)  # under autocast the tables are wider than the projections


class DecoderAttention(nn.Module):
    def __init__(self, config: QScorerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.scaling = (width // self.heads) ** -0.5
        self.num_key_value_groups = 1
        self.is_causal = True
        linear = partial(nn.Linear, width, width, bias=False)
        self.q_proj = linear()
        self.k_proj = Multiway(linear)
        self.v_proj = Multiway(linear)
        self.o_proj = linear()

    def forward(
        self,
        hidden_states: Tensor,
        visual: VisualSpan,
        rotary: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        last: int | None = None,
    ) -> Tensor:
        """(B, T, width) -> (B, T, width), or (B, last, width): attention of the last tokens to all."""
        asking, asking_rotary = hidden_states, rotary
        if last is not None:
            asking, asking_rotary = hidden_states[:, -last:], rotary[..., -last:, :]
        query = rotate(split_heads(self.q_proj(asking), self.heads), asking_rotary)
        key, value = self.keys_and_values(hidden_states, visual, rotary, cache)
        return self.o_proj(attend(self, query, key, value, attention_mask))

    def keys_and_values(
        self, hidden_states: Tensor, visual: VisualSpan, rotary: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, width) -> (B, heads, T, head_dim) each, after those of the cache, which takes them in."""
        key = rotate(split_heads(self.k_proj(hidden_states, visual), self.heads), rotary)
        value = split_heads(self.v_proj(hidden_states, visual), self.heads)
        return (key, value) if cache is None else cache.update(key, value, self.layer_idx)


class DecoderMLP(nn.Module):
    def __init__(self, config: QScorerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(gated)


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: QScorerConfig, layer_idx: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config, layer_idx)
        self.mlp = DecoderMLP(config)
        self.input_layernorm = Multiway(norm)
        self.post_attention_layernorm = Multiway(norm)

    def forward(
        self,
        hidden_states: Tensor,
        visual: VisualSpan,
        rotary: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        last: int | None = None,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states, visual)
        if last == 0:
            self.self_attn.keys_and_values(normed, visual, rotary, cache)
            return hidden_states[:, :0]
        attended = self.self_attn(normed, visual, rotary, attention_mask, cache, last)
        if last is not None:
            visual = visual.from_column(hidden_states.shape[1] - last)
            hidden_states = hidden_states[:, -last:]
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states, visual))


class Prefix(DynamicCache):
    """Keys and values (1, heads, P, head_dim) of a text, in every layer; joined to those of a batch without growing."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        batch = key_states.shape[0]
        keys = torch.cat([layer.keys.expand(batch, -1, -1, -1), key_states], dim=2)
        values = torch.cat([layer.values.expand(batch, -1, -1, -1), value_states], dim=2)
        return keys, values


class Decoder(PreTrainedModel):
    """Token embeddings, decoder layers, final norm. Base class of the backbone, which adds the visual parts."""

    def __init__(self, config: QScorerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def decode(
        self,
        embeddings: Tensor,
        visual: VisualSpan,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        last: int | None = None,
        every: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the decoder over (B, T, width) embeddings, causally.

        Args:
            attention_mask: (B, cached + T), True or 1 where a token counts; None: every token counts.
                Masked tokens take no position, so rows may be padded on either side.
            cache: keys and values of the tokens before; grows by T.
            last: number of states that are wanted, from the end; None: all. The last layer computes no others, and
                for 0 only what the cache takes in.
            every: gets the embeddings and the states after each layer, those of the last one after the final norm.

        Returns:
            (B, T, width) or (B, last, width) hidden states after the final norm.
        """
        cached = 0 if cache is None else cache.get_seq_length()
        length = embeddings.shape[1]
        if attention_mask is None:
            positions = torch.arange(cached, cached + length, device=embeddings.device)[None]
        else:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            **{CACHE_ARGUMENT: cache},
        )
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rotary = rotary_tables(positions, head_dim, self.config.rope_base, embeddings.dtype)
        hidden_states = embeddings
        *all_but_last, last_layer = self.layers
        for layer in all_but_last:
            if every is not None:
                every.append(hidden_states)
            hidden_states = layer(hidden_states, visual, rotary, mask, cache)
        kernel = self.config._attn_implementation
        if last == 0:
            return last_layer(hidden_states, visual, rotary, mask, cache, last)
        if last is not None and last < length and kernel in KERNELS_FOR_LAST:
            mask = mask_of_last(mask, last, cached + length, kernel, embeddings.device)
            return self.norm(last_layer(hidden_states, visual, rotary, mask, cache, last))
        before_last, hidden_states = hidden_states, self.norm(last_layer(hidden_states, visual, rotary, mask, cache))
        if every is not None:
            every += [before_last, hidden_states]
        return hidden_states if last is None else hidden_states[:, -last:]

    @torch.no_grad()
    def read_prefix(self, embeddings: Tensor) -> Prefix:
        """Keys and values of a text of (1, P, width) embeddings, as the `cache` of a `decode` of what follows it."""
        cache, prefix = DynamicCache(), Prefix()
        self.decode(embeddings, NO_VISUAL, cache=cache, last=0)
        prefix.layers = cache.layers
        return prefix
