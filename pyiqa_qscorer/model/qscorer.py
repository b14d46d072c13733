"""The whole network, and the published two-step scoring."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from .abstractor import CrossAttention, VisualAbstractor
from .config import QScorerConfig, QScorerVisionConfig
from .language import Decoder, RMSNorm
from .multiway import NO_VISUAL, VisualSpan
from .prefix import PrefixCache
from .regressor import HyperRegressor, ScoreRegressor
from .steps import Steps
from .vision import VisionEmbeddings, VisionEncoder

if TYPE_CHECKING:
    from .features import FeatureEncoder

IGNORED_LABEL = -100  # of a token that the cross entropy leaves out
IMAGE_TOKEN_ID = -200  # stands for the visual tokens in `input_ids`; published code uses the same number


@dataclass
class QScorerOutput(ModelOutput):
    """Of a teacher-forced pass over T text tokens and V visual tokens.

    Attributes:
        logits: (B, T - 1 + V, vocab_size).
        last_hidden_state: (B, T - 1 + V, width), after the final norm.
        visual_span: columns of the visual tokens.
        labels: (B, T - 1 + V) given labels with the visual tokens ignored.
        quality_rows: (N,) rows of the N positions before a quality token, in order.
        quality_logits: (N, vocab_size) logits there.
        raw_scores: (N,) unclamped scores there: of the regressor, or the expected level.
    """

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    visual_span: VisualSpan | None = None
    labels: Tensor | None = None
    quality_rows: Tensor | None = None
    quality_logits: Tensor | None = None
    raw_scores: Tensor | None = None


@dataclass
class ScoreOutput:
    """Of scoring.

    Attributes:
        raw_score: (B,) unclamped, in the dtype of the weights (level formulations: float32).
        first_token: (B,) ids that greedy decoding chose after the prompt.
        first_logits: (B, vocab_size) logits they were chosen from.
        hidden_state: (B, width) state that the score was read from: at the first token, or, in the level formulations,
            at the end of the prompt.
    """

    raw_score: Tensor
    first_token: Tensor
    first_logits: Tensor
    hidden_state: Tensor


class QScorerBackbone(Decoder):
    """Decoder plus vision encoder and visual abstractor (`model.*` in a checkpoint)."""

    def __init__(self, config: QScorerConfig) -> None:
        super().__init__(config)
        self.vision_model = vision_encoder(config.vision_config)
        self.visual_abstractor = VisualAbstractor(config.abstractor_config, config.hidden_size)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pixels -> (B, V, width) visual tokens, in the dtype of the weights.

        A `FeatureEncoder` also takes its `statistics` of them.
        """
        # Read off a weight that quantisation leaves alone.
        dtype = self.visual_abstractor.query_embeds.dtype
        return self.visual_abstractor(self.vision_model(pixel_values.to(dtype)))


def vision_encoder(config: QScorerVisionConfig) -> VisionEncoder | FeatureEncoder:
    """The encoder that the configuration asks for."""
    if config.kind == "vit":
        return VisionEncoder(config)
    from .features import FeatureEncoder  # imports timm, which takes a while

    return FeatureEncoder(config)


class QScorerPreTrainedModel(PreTrainedModel):
    config_class = QScorerConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
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


class QScorerForScoring(QScorerPreTrainedModel):
    """Q-Scorer: image in, score out. Parameter names are those of the published checkpoints."""

    def __init__(self, config: QScorerConfig) -> None:
        super().__init__(config)
        for part in (config.vision_config, config.abstractor_config):
            # transformers settles its default on the whole only; without one the visual parts would fall back to eager.
            if part._attn_implementation is None:
                part._attn_implementation = config._attn_implementation
        self.model = QScorerBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        regressor = HyperRegressor if config.regressor == "hyper" else ScoreRegressor
        self.deepmlp = regressor(config.hidden_size, config.regressor_hidden_sizes)
        self.steps = Steps()
        self.prefix_cache = PrefixCache()
        self.post_init()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QScorerForScoring:
        self.prefix_cache.clear()  # it would keep the memory of the old weights
        return super()._apply(fn, recurse)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> QScorerOutput:
        """Teacher-forced pass, for training and inspection.

        Args:
            input_ids: (B, T) token ids with one `IMAGE_TOKEN_ID` per row, in the same column of every row
                (pad shorter rows on the left to align them).
            pixel_values: (B, 3, S, S) normalised pixels, see `pyiqa_qscorer.images.preprocessing`.
            attention_mask: (B, T), True or 1 where a token counts; None: all count.
            labels: (B, T) the tokens to predict, -100 where none is; with them the scores before every quality token
                come back too.

        Raises:
            ValueError: a row without exactly one image, or images in different columns.
        """
        column = _image_column(input_ids)
        visual_tokens = self.model.encode_images(pixel_values)
        if visual_tokens.shape[0] != input_ids.shape[0]:
            raise ValueError(
                "pixel_values must hold one image per row of input_ids, "
                f"got {visual_tokens.shape[0]} images and {input_ids.shape[0]} rows"
            )
        embed = self.model.embed_tokens
        before, after = input_ids[:, :column], input_ids[:, column + 1 :]
        embeddings = torch.cat([embed(before), visual_tokens, embed(after)], dim=1)
        span = VisualSpan(column, column + visual_tokens.shape[1])
        if attention_mask is not None:
            seen = attention_mask.new_ones(attention_mask.shape[0], visual_tokens.shape[1])
            attention_mask = torch.cat([attention_mask[:, :column], seen, attention_mask[:, column + 1 :]], dim=1)
        hidden_states = self.model.decode(embeddings, span, attention_mask)
        logits = self.lm_head(hidden_states)
        output = QScorerOutput(logits=logits, last_hidden_state=hidden_states, visual_span=span)
        if labels is not None:
            ignored = labels.new_full((labels.shape[0], visual_tokens.shape[1]), IGNORED_LABEL)
            output.labels = torch.cat([labels[:, :column], ignored, labels[:, column + 1 :]], dim=1)
            rows, positions = quality_positions(output.labels, self.config.quality_token_ids)
            output.quality_rows, output.quality_logits = rows, logits[rows, positions]
            if self.config.formulation == "score_token":
                output.raw_scores = self.deepmlp(hidden_states[rows, positions], visual_tokens[rows])
            else:
                output.raw_scores = expected_level(output.quality_logits[:, self.config.level_token_ids])
        return output

    def score(
        self,
        pixel_values: Tensor,
        prefix_ids: Sequence[int],
        suffix_ids: Sequence[int],
        space_id: int,
    ) -> ScoreOutput:
        """Score images: in the level formulations the expected level, else the published two steps.

        Greedy decoding chooses a first token t1 after the prompt; the hidden state at t1 feeds the regressor. A
        trained model chooses the blank before the score token, so the blank is appended and both steps share one
        pass. The pass itself tells t1 (causal attention: the states before the blank do not see it); rows where t1 is
        another token take the second step with that token. What is asked of the device waits for all of the one pass,
        so that it never runs dry in between. The prefix comes from a cache where `PrefixCache` allows it.

        Args:
            pixel_values: (B, 3, S, S) normalised pixels.
            prefix_ids, suffix_ids: prompt before and after the image.
            space_id: id of the blank that stands before a score token.
        """
        prompt = (tuple(prefix_ids), tuple(suffix_ids))
        visual_tokens = self.steps.encode(self.model, pixel_values)
        if self.config.formulation != "score_token":
            at_end = self._read(visual_tokens, *prompt, wanted=1)[:, 0]
            logits = self.lm_head(at_end)
            score = expected_level(logits[:, self.config.level_token_ids])
            if self._prefix_is_stale():
                return self.score(pixel_values, prefix_ids, suffix_ids, space_id)
            return ScoreOutput(score, logits.argmax(dim=-1), logits, at_end)
        blank = visual_tokens.new_full((len(visual_tokens),), space_id, dtype=torch.long)
        at_end, at_first_token = self._read(visual_tokens, *prompt, wanted=2, last=blank).unbind(dim=1)
        first_logits = self.lm_head(at_end)
        first_token = first_logits.argmax(dim=-1)
        raw_score = self.deepmlp(at_first_token, visual_tokens)
        other = first_token != blank
        if self._prefix_is_stale():
            return self.score(pixel_values, prefix_ids, suffix_ids, space_id)
        if bool(other.any()):
            rows = other.nonzero().squeeze(-1)
            second = self._read(visual_tokens[rows], *prompt, wanted=1, last=first_token[rows])[:, 0]
            at_first_token = at_first_token.index_put((rows,), second)
            raw_score = self.deepmlp(at_first_token, visual_tokens)
        return ScoreOutput(raw_score, first_token, first_logits, hidden_state=at_first_token)

    def _prefix_is_stale(self) -> bool:
        """Whether weights were changed behind the back of the prefix cache, which is empty then."""
        changed = self.prefix_cache.changed()
        if changed is None or not bool(changed):
            return False
        self.prefix_cache.clear()
        return True

    def _read(
        self,
        visual_tokens: Tensor,
        prefix_ids: tuple[int, ...],
        suffix_ids: tuple[int, ...],
        wanted: int,
        last: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, wanted, width) at the end of prompt and image, and of the tokens `last` (B,) after it."""
        batch = visual_tokens.shape[0]
        prefix = self.prefix_cache.get(
            prefix_ids, (self.model.embed_tokens, self.model.layers), lambda: self._read_prefix(prefix_ids)
        )
        parts = [visual_tokens, self._embed_text(suffix_ids, batch)]
        if last is not None:
            parts.append(self.model.embed_tokens(last)[:, None])
        before = 0 if prefix is not None else len(prefix_ids)
        if before:
            parts.insert(0, self._embed_text(prefix_ids, batch))
        span = VisualSpan(before, before + visual_tokens.shape[1])
        return self.steps.decode(self.model, torch.cat(parts, dim=1), span, prefix, wanted)

    def _read_prefix(self, ids: tuple[int, ...]) -> DynamicCache:
        cache = DynamicCache()
        self.model.decode(self._embed_text(ids, 1), NO_VISUAL, cache=cache)
        return cache

    def _embed_text(self, ids: tuple[int, ...], batch: int) -> Tensor:
        tokens = _ids_on(ids, self.model.embed_tokens.weight.device)
        return self.model.embed_tokens(tokens).expand(batch, -1, -1)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _ids_on(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Token ids (1, T) on a device, where they stay: copying them there would wait for all work in progress."""
    return torch.tensor([ids], dtype=torch.long, device=device)


def quality_positions(labels: Tensor, quality_token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where teacher forcing reads the quality: positions t whose label at t + 1 is a quality token.

    Args:
        labels: (B, T) int64, of the merged sequence (visual tokens included).
        quality_token_ids: ids of the score or level tokens; which of them it is does not matter.

    Returns:
        Row indices (N,) and position indices (N,), int64, ordered by row, then position. A row with two quality tokens
        comes twice, a row with none not at all.

    Raises:
        ValueError: no quality token ids, or labels that are not (B, T).
    """
    if labels.ndim != 2:
        raise ValueError(f"labels must be (B, T), got {tuple(labels.shape)}")
    if not len(quality_token_ids):
        raise ValueError("quality_token_ids must name at least one token; the configuration has none")
    ids = torch.tensor(list(quality_token_ids), device=labels.device)
    rows, positions = torch.isin(labels[:, 1:], ids).nonzero(as_tuple=True)
    return rows, positions


def expected_level(logits: Tensor) -> Tensor:
    """(..., K) logits of the level tokens, lowest first -> (...) float32 expectation of K equal steps from 1 to 5.

    The score restoration of Q-Align and DeQA-Score: softmax over the level tokens only.
    """
    values = torch.linspace(1, 5, logits.shape[-1], device=logits.device)
    return logits.float().softmax(dim=-1) @ values


def _image_column(input_ids: Tensor) -> int:
    """Column of the image placeholder, which must be one and the same in every row."""
    rows, columns = (input_ids == IMAGE_TOKEN_ID).nonzero(as_tuple=True)
    found = columns.tolist()
    if rows.tolist() != list(range(input_ids.shape[0])) or len(set(found)) != 1:
        raise ValueError(
            f"input_ids must hold the image placeholder {IMAGE_TOKEN_ID} once per row and in one column, "
            f"found it at (row, column) {list(zip(rows.tolist(), found, strict=True))[:8]}; "
            "pad shorter rows on the left to align them"
        )
    return found[0]
