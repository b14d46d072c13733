"""The decoder with the visual parts before it, and what transformers asks of a model made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .abstractor import CrossAttention, VisualAbstractor
from .configuration import QScorerConfig, QScorerVisionConfig
from .language import Decoder, RMSNorm
from .vision import VisionEmbeddings, VisionEncoder

if TYPE_CHECKING:
    from .features import FeatureEncoder


def vision_encoder(config: QScorerVisionConfig) -> VisionEncoder | FeatureEncoder:
    """The encoder that the configuration asks for."""
    if config.kind == "vit":
        return VisionEncoder(config)
    from .features import FeatureEncoder  # imports timm, which takes a while

    return FeatureEncoder(config)


class QScorerPreTrainedModel(PreTrainedModel):
    """Base class of our models: how transformers splits, places and initialises their parts."""

    config_class = QScorerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "VisionLayer", "AbstractorLayer", "VisionEmbeddings"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012  (transformers declares both as instance attributes)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range) weights and zero biases, as transformers leaves the published regressor.

        Goes through `transformers.initialization`, which spares what a checkpoint has already filled.
        """
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, (nn.LayerNorm, RMSNorm)):
            init.ones_(module.weight)
        elif isinstance(module, VisionEmbeddings):
            init.normal_(module.cls_token, mean=0.0, std=std)
            init.normal_(module.position_embedding, mean=0.0, std=std)
        elif isinstance(module, VisualAbstractor):
            init.normal_(module.query_embeds, mean=0.0, std=std)
            init.normal_(module.vit_eos, mean=0.0, std=std)
        elif isinstance(module, CrossAttention):
            query_table, key_table = module.position_tables()
            init.copy_(module.q_pos_embed, query_table)
            init.copy_(module.k_pos_embed, key_table)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            init.zeros_(bias)


class QScorerBackbone(QScorerPreTrainedModel, Decoder):
    """Decoder plus vision encoder and visual abstractor (`model.*` in a checkpoint)."""

    def __init__(self, config: QScorerConfig) -> None:
        super().__init__(config)
        self.vision_model = vision_encoder(config.vision_config)
        self.visual_abstractor = VisualAbstractor(config.abstractor_config, config.hidden_size)
        self.post_init()

    def init_weights(self) -> None:
        """Nothing: the whole model initialises all parts at once, so that a seed gives the same weights as ever."""

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pixels -> (B, V, width) visual tokens, in the dtype of the weights.

        A `FeatureEncoder` also takes its `statistics` of them.
        """
        # Read off a weight that quantisation leaves alone.
        dtype = self.visual_abstractor.query_embeds.dtype
        return self.visual_abstractor(self.vision_model(pixel_values.to(dtype)))
