"""The published scoring procedure, written from its specification, on the weights of one of our models.

What the published scorer does, with all it does in vain: images are prepared one after the other with PIL and numpy;
the whole network runs twice, vision included; attention is eager; text and visual tokens are told apart by gathering
with a mask; logits are computed at every position; key/value caches are built and thrown away. It holds no weights of
its own: every matrix is that of the model it was made for, so both must give the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pyiqa_qscorer.images.preprocessing import MEAN, PAD_COLOR, STD
from pyiqa_qscorer.model import QScorerForScoring
from pyiqa_qscorer.model.abstractor import AbstractorLayer
from pyiqa_qscorer.model.language import DecoderLayer
from pyiqa_qscorer.model.multiway import Multiway
from pyiqa_qscorer.model.vision import VisionEncoder, VisionLayer


class PublishedProcedure:
    """Two full passes over the weights of `model`."""

    def __init__(self, model: QScorerForScoring) -> None:
        self.model = model

    @torch.no_grad()
    def score(self, pixel_values: Tensor, prefix: Sequence[int], suffix: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) pixels -> raw scores (B,) and chosen tokens (B,)."""
        device = self.model.lm_head.weight.device
        after = torch.tensor([list(suffix)] * len(pixel_values), dtype=torch.long, device=device)
        before = torch.tensor([list(prefix)] * len(pixel_values), dtype=torch.long, device=device)
        for step in range(2):
            states = self.states(pixel_values, before, after)
            logits = self.model.lm_head(states)
            chosen = logits[:, -1].argmax(dim=-1)
            if step == 0:
                first = chosen
                after = torch.cat([after, chosen[:, None]], dim=1)
        return self.model.deepmlp(states[:, -1], None), first

    def states(self, pixel_values: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Hidden states (B, T, width) of prompt and image after the final norm."""
        backbone = self.model.model
        visual = self.visual_tokens(pixel_values)
        embeddings = torch.cat([backbone.embed_tokens(before), visual, backbone.embed_tokens(after)], dim=1)
        is_visual = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        is_visual[:, before.shape[1] : before.shape[1] + visual.shape[1]] = True
        length, config = embeddings.shape[1], self.model.config
        lowest = torch.finfo(embeddings.dtype).min
        mask = torch.full((length, length), lowest, dtype=embeddings.dtype, device=embeddings.device).triu(1)
        head_dim = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, device=embeddings.device).float() / head_dim
        frequencies = 1.0 / config.rope_base**exponents
        angles = torch.outer(torch.arange(length, device=embeddings.device).float(), frequencies).repeat(1, 2)
        rotary = angles.cos().to(embeddings.dtype), angles.sin().to(embeddings.dtype)
        thrown_away = []
        for layer in backbone.layers:
            embeddings, cache = self.decoder_layer(layer, embeddings, is_visual, mask, rotary)
            thrown_away.append(cache)
        return backbone.norm(embeddings)

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        backbone = self.model.model
        vision, abstractor = backbone.vision_model, backbone.visual_abstractor
        pixel_values = pixel_values.to(abstractor.query_embeds.dtype)
        if isinstance(vision, VisionEncoder):
            hidden = vision.embeddings(pixel_values)
            for layer in vision.encoder.layers:
                hidden = self.vision_layer(layer, hidden)
            hidden = vision.post_layernorm(hidden)
        else:  # small models have an encoder that the published code does not know
            hidden = vision(pixel_values)
        queries = abstractor.query_embeds.repeat(len(hidden), 1, 1)
        for layer in abstractor.encoder.layers:
            queries = self.abstractor_layer(layer, queries, hidden)
        return torch.cat([abstractor.visual_fc(queries), abstractor.vit_eos.repeat(len(hidden), 1, 1)], dim=1)

    def vision_layer(self, layer: VisionLayer, hidden: Tensor) -> Tensor:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        mixed = attention.query_key_value(normed).unflatten(-1, (attention.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        weights = ((mixed[0] @ mixed[1].transpose(-1, -2)) * attention.scaling).softmax(dim=-1)
        hidden = hidden + attention.dense((weights @ mixed[2]).transpose(1, 2).flatten(2))
        inner = layer.mlp.fc1(layer.post_attention_layernorm(hidden))
        return hidden + layer.mlp.fc2(inner * torch.sigmoid(1.702 * inner))

    def abstractor_layer(self, layer: AbstractorLayer, queries: Tensor, image: Tensor) -> Tensor:
        block = layer.crossattention
        attention, output = block.attention, block.output
        normed = block.norm1(queries)
        tokens = torch.cat([normed, block.normk(image)], dim=1)
        query_table, image_table = (table.to(tokens.dtype) for table in (attention.q_pos_embed, attention.k_pos_embed))
        positions = torch.cat([query_table, image_table])
        query, key, value = (
            states.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for states in (
                attention.query(normed + query_table),
                attention.key(tokens + positions),
                attention.value(tokens),
            )
        )
        weights = ((query @ key.transpose(-1, -2)) / math.sqrt(query.shape[-1])).softmax(dim=-1)
        residual = normed + output.out_proj((weights @ value).transpose(1, 2).flatten(2))
        inner, mlp = output.norm2(residual), output.mlp
        return residual + mlp.w2(mlp.ffn_ln(F.silu(mlp.w1(inner)) * mlp.w3(inner)))

    def decoder_layer(
        self, layer: DecoderLayer, hidden: Tensor, is_visual: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attention, mlp = layer.self_attn, layer.mlp
        normed = gather(layer.input_layernorm, hidden, is_visual)
        query, key, value = (
            states.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for states in (
                attention.q_proj(normed),
                gather(attention.k_proj, normed, is_visual),
                gather(attention.v_proj, normed, is_visual),
            )
        )
        query, key = rotated(query, rotary), rotated(key, rotary)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(hidden.dtype, torch.float32)).to(hidden.dtype)
        hidden = hidden + attention.o_proj((weights @ value).transpose(1, 2).flatten(2))
        normed = gather(layer.post_attention_layernorm, hidden, is_visual)
        hidden = hidden + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        return hidden, (key, value)


def gather(module: Multiway, states: Tensor, is_visual: Tensor) -> Tensor:
    """Each of the two copies on the tokens that a mask picks, put back where they were."""
    output: Tensor | None = None
    for way, copy in enumerate(module.multiway):
        chosen = (is_visual == bool(way)).nonzero(as_tuple=True)  # on CUDA this waits for the device
        part = copy(states[chosen])
        if output is None:
            output = part.new_empty(*states.shape[:2], part.shape[-1])
        output[chosen] = part
    return output


def rotated(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * rotary[0] + torch.cat([-second, first], dim=-1) * rotary[1]


def prepared(path: Path, size: int) -> Tensor:
    """Pixel values (3, size, size) of a file: pad, resize, rescale and normalise with PIL and numpy, in this thread."""
    image = Image.open(path).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD_COLOR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    levels = np.array(square.resize((size, size), Image.Resampling.BICUBIC))
    scaled = (levels * 0.00392156862745098).astype(np.float32)
    normalised = (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(normalised).permute(2, 0, 1)
