"""The whole network, and the published two-step scoring."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..prompt import PromptTokens
from .backbone import QScorerBackbone, QScorerPreTrainedModel
from .compiled import CompiledBackbone
from .configuration import QScorerConfig
from .language import Prefix
from .multiway import VisualSpan
from .network import IGNORED_LABEL, expected_level, make_regressor, next_token_cross_entropy, read_quality

SMALLEST_SHARING_BATCH = 8  # of images on an accelerator whose prompt is read in a pass of its own
IMAGE_TOKEN_ID = -200  # stands for the visual tokens in `input_ids`; published code uses the same number


@dataclass
class QScorerOutput(ModelOutput):
    """Result of a teacher-forced pass over T text tokens and V visual tokens.

    `loss` is the cross entropy of the supervised tokens. What the package trains is
    `training.objectives.total_objective`, of which this is one part.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, T - 1 + V, vocab_size)
    last_hidden_state: Tensor | None = None  # (B, T - 1 + V, width), after the final norm
    visual_span: VisualSpan | None = None  # columns of the visual tokens
    labels: Tensor | None = None  # (B, T - 1 + V), those of visual tokens ignored
    quality_rows: Tensor | None = None  # (N,) rows of the N positions before a quality token, in order
    quality_logits: Tensor | None = None  # (N, vocab_size)
    raw_scores: Tensor | None = None  # (N,) unclamped: of the regressor, or the expected level
    hidden_states: tuple[Tensor, ...] | None = None  # embeddings, then after each layer, the last after the final norm


@dataclass
class ScoreOutput:
    """Scores of a batch, and what they were read from: the first token, or (level formulations) the prompt's end."""

    raw_score: Tensor  # (B,) unclamped, in the dtype of the weights (level formulations: float32)
    first_token: Tensor  # (B,) ids that greedy decoding chose after the prompt
    first_logits: Tensor  # (B, vocab_size) that they were chosen from
    hidden_state: Tensor  # (B, width) that the score was read from


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
        self.deepmlp = make_regressor(config.regressor, config.hidden_size, config.regressor_hidden_sizes)
        self.compiled: CompiledBackbone | None = None  # scores without gradients run through it
        self.post_init()

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
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QScorerOutput | tuple[Any, ...]:
        """Teacher-forced pass, for training and inspection.

        Args:
            input_ids: (B, T) token ids with one `IMAGE_TOKEN_ID` per row, in the same column of every row
                (pad shorter rows on the left to align them).
            pixel_values: (B, 3, S, S) normalised pixels, see `pyiqa_qscorer.images.preprocessing`.
            attention_mask: (B, T), True or 1 where a token counts; None: all count.
            labels: (B, T) the tokens to predict, -100 where none is; with them the scores before every quality token
                come back too.
            output_hidden_states: return the states of every layer as well; None: as the configuration says.
            return_dict: False: a tuple of what is not None, in the order of `QScorerOutput`; None: as there.

        Raises:
            ValueError: a row without exactly one image, or images in different columns.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
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
        every: list[Tensor] | None = [] if output_hidden_states else None
        hidden_states = self.model.decode(embeddings, span, attention_mask, every=every)
        logits = self.lm_head(hidden_states)
        told: dict[str, Any] = {}
        if labels is not None:
            ignored = labels.new_full((labels.shape[0], visual_tokens.shape[1]), IGNORED_LABEL)
            merged = torch.cat([labels[:, :column], ignored, labels[:, column + 1 :]], dim=1)
            if bool((merged[:, 1:] != IGNORED_LABEL).any()):
                told["loss"] = next_token_cross_entropy(logits, merged)
            rows, positions = quality_positions(merged, self.config.quality_token_ids)
            states, at_quality = hidden_states[rows, positions], logits[rows, positions]
            settings = (self.config.formulation, self.config.level_token_ids, self.deepmlp)
            scores = read_quality(*settings, states, at_quality, visual_tokens[rows])
            told |= {"labels": merged, "quality_rows": rows, "quality_logits": at_quality, "raw_scores": scores}
        if every is not None:
            told["hidden_states"] = tuple(every)
        output = QScorerOutput(logits=logits, last_hidden_state=hidden_states, visual_span=span, **told)
        return output if return_dict else output.to_tuple()

    def score_prompted(self, images: Tensor, prompt: PromptTokens, prefix: Prefix | None = None) -> ScoreOutput:
        """Score images by the two published steps; a level formulation by the expected level.

        Greedy decoding chooses a first token t1 after the prompt; the hidden state at t1 feeds the regressor. A
        trained model chooses the blank before the score token, so the blank is appended and both steps share one
        pass. The pass itself tells t1 (causal attention: the states before the blank do not see it); rows where t1 is
        another token take the second step with that token. The host asks the device only once, after all of the one
        pass is on its way.

        Args:
            images: (B, 3, S, S) normalised pixels.
            prompt: made by `tokenize_prompt`.
            prefix: `read_prefix` of the prompt and of the very weights that are to score, without gradients; None: it
                is read here.

        Returns:
            Scores that are NaN where the logits are not finite, from which no token can be chosen.
        """
        visual_tokens = self._backbone.encode_images(images.to(self.device))
        if prefix is None:
            prefix = self._prefix(prompt, len(images))
        read = functools.partial(self._read, prompt, prefix)
        if self.config.formulation != "score_token":
            at_end = read(visual_tokens, wanted=1)[:, 0]
            logits = self.lm_head(at_end)
            score = expected_level(logits[:, self.config.level_token_ids])
            return ScoreOutput(score, logits.argmax(dim=-1), logits, hidden_state=at_end)

        blank = visual_tokens.new_full((len(visual_tokens),), prompt.blank, dtype=torch.long)
        at_end, at_first_token = read(visual_tokens, blank, wanted=2).unbind(dim=1)
        first_logits = self.lm_head(at_end)
        first_token = first_logits.argmax(dim=-1)
        raw_score = self.deepmlp(at_first_token, visual_tokens)
        other = first_token != blank
        if bool(other.any()):
            rows = other.nonzero().squeeze(-1)
            second = read(visual_tokens[rows], first_token[rows], wanted=1)[:, 0]
            at_first_token = at_first_token.index_put((rows,), second)
            raw_score = self.deepmlp(at_first_token, visual_tokens)
        raw_score = raw_score.masked_fill(~first_logits.isfinite().all(dim=-1), torch.nan)
        return ScoreOutput(raw_score, first_token, first_logits, hidden_state=at_first_token)

    def score_collated(self, batch: Mapping[str, Tensor], prompt: PromptTokens) -> ScoreOutput:
        """The same of a training batch."""
        return self.score_prompted(batch["pixel_values"], prompt)

    @property
    def _backbone(self) -> QScorerBackbone | CompiledBackbone:
        plain = self.compiled is None or torch.is_grad_enabled() or torch.compiler.is_compiling()
        return self.model if plain else self.compiled  # type: ignore[return-value]

    def _read(
        self,
        prompt: PromptTokens,
        prefix: Prefix | None,
        visual_tokens: Tensor,
        last: Tensor | None = None,
        *,
        wanted: int,
    ) -> Tensor:
        """Hidden states (B, wanted, width) at the end of prompt and image, and of the tokens `last` (B,) after it."""
        batch = len(visual_tokens)
        before = 0 if prefix is not None else len(prompt.prefix)
        parts = [visual_tokens, self._embed_text(prompt.suffix).expand(batch, -1, -1)]
        if before:
            parts.insert(0, self._embed_text(prompt.prefix).expand(batch, -1, -1))
        if last is not None:
            parts.append(self.model.embed_tokens(last)[:, None])
        span = VisualSpan(before, before + visual_tokens.shape[1])
        return self._backbone.decode(torch.cat(parts, dim=1), span, cache=prefix, last=wanted)

    def _prefix(self, prompt: PromptTokens, batch: int) -> Prefix | None:
        """The text before the image, which is the same for all images, read once for a batch.

        None where it goes through the decoder with every image: there is none, its gradient is wanted, or the batch
        is so small that on an accelerator, where a pass over few tokens takes as long as one over many, a second pass
        costs more than it saves. It is not kept for the next batch, only callers can know that no weight changes until
        then: a write to `.data` leaves no trace.
        """
        wants_gradient = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.model.parameters())
        too_few = self.model.embed_tokens.weight.device.type != "cpu" and batch < SMALLEST_SHARING_BATCH
        return None if wants_gradient or too_few else self.read_prefix(prompt)

    def read_prefix(self, prompt: PromptTokens) -> Prefix | None:
        """The text before the image, for as long as no weight changes; None: there is none."""
        return self.model.read_prefix(self._embed_text(prompt.prefix)) if prompt.prefix else None

    def _embed_text(self, ids: Sequence[int]) -> Tensor:
        """(1, T, width) embeddings."""
        tokens = _ids_on(tuple(ids), self.model.embed_tokens.weight.device)
        return self.model.embed_tokens(tokens)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _ids_on(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Token ids (1, T) on a device, where they stay: copying them there would wait for all work in progress."""
    return torch.tensor([ids], dtype=torch.long, device=device)


def quality_positions(labels: Tensor, quality_token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where teacher forcing reads the quality: positions t whose label at t + 1 is a quality token.

    Args:
        labels: (B, T) int64, of the merged sequence (visual tokens included).

    Returns:
        Rows (N,) and positions (N,), ordered by row, then position: a row with two quality tokens comes twice.

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
