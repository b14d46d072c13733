"""Q-Scorer on any image-text-to-text model of transformers: its own processor, our score tokens and regressor.

What of the published method is different here: the score token follows the answer's beginning without a blank, so one
pass over the prompt gives both the token and the state that the score is read from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .network import IGNORED_LABEL, make_regressor, read_quality
from .qscorer import QScorerOutput, ScoreOutput, quality_positions
from .vlm_inputs import ChatPrompt, VlmInputs


@dataclass
class VlmConfig:
    """Facts of a Q-Scorer on another backbone; the content of its `qscorer_config.json`. See also `QScorerConfig`."""

    base: str  # Hub id or folder
    quality_tokens: list[str]  # score tokens or level words, lowest quality first
    quality_token_ids: list[int]
    formulation: str = "score_token"
    regressor: str = "mlp"
    regressor_hidden_sizes: list[int] = field(default_factory=lambda: [512, 128])
    prompt: str = "training"
    base_revision: str | None = None  # commit on the Hub that it was trained on
    base_fingerprint: str | None = None  # of its weight files, see `vlm_checkpoint.base_fingerprint`
    training_data: Any = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> VlmConfig:
        """Raises `ValueError`: a field that is missing, unknown, or of another type."""
        known = {one.name for one in fields(cls)} | {"format"}
        if odd := sorted(content.keys() - known):
            raise ValueError(f"unknown fields {', '.join(odd)}: it was written by a newer release")
        try:
            made = cls(**{name: value for name, value in content.items() if name != "format"})
        except TypeError as error:
            raise ValueError(str(error).replace("VlmConfig.__init__() ", "")) from error
        tokens, ids = made.quality_tokens, made.quality_token_ids
        if not isinstance(ids, list) or not all(type(one) is int and one >= 0 for one in ids):
            raise ValueError(f"quality_token_ids must be a list of ids, got {ids!r}")
        if made.formulation not in ("score_token", "level_onehot", "level_soft") or len(tokens) != len(ids) or not ids:
            raise ValueError(f"formulation {made.formulation!r} with tokens {tokens} and ids {ids} do not fit together")
        return made

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}

    def to_json_string(self) -> str:
        """For what transformers' callbacks log."""
        return json.dumps(self.to_dict(), indent=2)

    @property
    def level_token_ids(self) -> list[int]:
        return [] if self.formulation == "score_token" else self.quality_token_ids

    @property
    def score_tokens(self) -> list[str]:
        """Those that are new to the vocabulary."""
        return self.quality_tokens if self.formulation == "score_token" else []


class VlmQScorer(nn.Module):
    """A backbone with score tokens and regressor; see `network.ScoringNetwork`.

    Args:
        base: of `AutoModelForImageTextToText`, its vocabulary tables long enough for the quality tokens.

    Raises:
        ValueError: a backbone that changes its logits after the output layer, which this class would not, or one
            without a token for pictures.
    """

    def __init__(self, base: PreTrainedModel, encode: VlmInputs, config: VlmConfig) -> None:
        super().__init__()
        self.base, self.encode, self.config = base, encode, config
        text = base.config.get_text_config()
        for name, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
            if getattr(text, name, neutral) not in (neutral, None):
                raise ValueError(f"backbone has {name}={getattr(text, name)}, which is not supported")
        names = ("image_token_id", "image_token_index")
        image_ids = [found for name in names if (found := getattr(base.config, name, None)) is not None]
        if not image_ids:
            raise ValueError(f"backbone's configuration must say the token of a picture as {' or '.join(names)}")
        self.image_id: int = image_ids[0]
        self.deepmlp = make_regressor(config.regressor, text.hidden_size, config.regressor_hidden_sizes)

    @property
    def device(self) -> torch.device:
        return next(self.deepmlp.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return next(value.dtype for value in self.base.parameters() if value.is_floating_point())

    def forward(self, labels: Tensor, **inputs: Tensor) -> QScorerOutput:
        """Teacher-forced pass of `VlmInputs.with_answer`.

        Returns:
            Logits, states and labels of the last columns only: those with labels, and the one before.
        """
        supervised = int((labels != IGNORED_LABEL).sum(dim=1).max())
        states = self._states(inputs)
        visual = self._visual(inputs, states)
        states, labels = states[:, -supervised - 1 :], labels[:, -supervised - 1 :]
        logits = self.base.get_output_embeddings()(states)
        rows, positions = quality_positions(labels, self.config.quality_token_ids)
        at_quality, of_quality = states[rows, positions], logits[rows, positions]
        return QScorerOutput(
            logits=logits,
            last_hidden_state=states,
            labels=labels,
            quality_rows=rows,
            quality_logits=of_quality,
            raw_scores=self._read(at_quality, of_quality, visual[rows]),
        )

    def score_prompted(self, images: Sequence[Tensor], prompt: ChatPrompt, prefix: None = None) -> ScoreOutput:
        """Scores of pictures (3, H, W), levels: uint8, or floating point 0..255 where a gradient is wanted."""
        moved = [image.to(self.device, non_blocking=True) for image in images]
        return self._score(self.encode(moved, [prompt] * len(moved)))

    def score_collated(self, batch: Mapping[str, Tensor], prompt: ChatPrompt) -> ScoreOutput:
        """The same of a training batch, whose pictures are processed already."""
        return self._score(self.encode.without_answer(batch, prompt))

    def _score(self, inputs: Mapping[str, Tensor]) -> ScoreOutput:
        states = self._states(inputs)
        at_end = states[:, -1]
        logits = self.base.get_output_embeddings()(at_end)
        raw = self._read(at_end, logits, self._visual(inputs, states))
        raw = raw.masked_fill(~logits.isfinite().all(dim=-1), torch.nan)
        return ScoreOutput(raw, logits.argmax(dim=-1), logits, hidden_state=at_end)

    def read_prefix(self, prompt: ChatPrompt) -> None:
        """Nothing: chat formats put the picture first, or so near that a pass of its own does not pay."""

    def _states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, T, width), after the final norm."""
        ready = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        core = getattr(self.base, self.base.base_model_prefix)
        states: Tensor = core(**ready, use_cache=False).last_hidden_state
        return states

    def _visual(self, inputs: Mapping[str, Tensor], states: Tensor) -> Tensor:
        """(B, 1, width) mean of the states that stand at the picture's tokens."""
        at_image = inputs["input_ids"].to(states.device).eq(self.image_id).unsqueeze(-1).to(states.dtype)
        return (states * at_image).sum(dim=1, keepdim=True) / at_image.sum(dim=1, keepdim=True).clamp(min=1)

    def _read(self, states: Tensor, logits: Tensor, visual: Tensor) -> Tensor:
        config, dtype = self.config, next(self.deepmlp.parameters()).dtype
        if not torch.is_autocast_enabled(states.device.type):
            states, visual = states.to(dtype), visual.to(dtype)
        return read_quality(config.formulation, config.level_token_ids, self.deepmlp, states, logits, visual)
