"""Models to start training from: a base without regressor, a model that scores already, or a new network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import CheckpointError
from ..model import QScorerConfig, QScorerForScoring
from ..model.fast_linear import use_fast_linear
from ..prompt import score_tokens
from .layouts import CheckpointFolder, Layout, recognise, weight_shards
from .load import empty_model, load_folder, load_tokenizer
from .weights import WeightFiller, read_shard

VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
REGRESSOR_PREFIX = "deepmlp."


@dataclass
class StartingPoint:
    """A model to train, its tokenizer, and stages of its feature network that it has not been trained to read."""

    model: QScorerForScoring
    tokenizer: PreTrainedTokenizerBase
    new_stages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Formulation:
    """How the trained model is to tell the quality.

    Attributes:
        name: `score_token`, `level_onehot` or `level_soft`.
        levels: number of score tokens or level words.
        words: level words, lowest quality first; unused with score tokens.
        regressor, regressor_hidden_sizes: see `QScorerConfig`; sizes None: the checkpoint's, or the default.
    """

    name: str
    levels: int
    words: Sequence[str]
    regressor: str = "mlp"
    regressor_hidden_sizes: Sequence[int] | None = None


def start_from_checkpoint(
    path: Path,
    base: Path | None,
    formulation: Formulation,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
) -> StartingPoint:
    """Model of a checkpoint folder: a base (mPLUG-Owl2 as published) gets what it lacks, a scoring model goes on.

    A base gets the new vocabulary rows and the regressor as the published training gives them: input rows
    N(0, 0.02), output rows the mean of the old ones, regressor weights N(0, 0.02) with zero biases.

    Raises:
        CheckpointError: unreadable, or trained with another formulation, number of levels or regressor.
    """
    folder = recognise(path, base)
    if folder.layout is Layout.PUBLISHED_MERGED and not folder.config.get("score_token_id"):
        return _start_from_base(folder, formulation, dtype, attn_implementation)
    precision: Any = str(dtype).removeprefix("torch.")
    loaded = load_folder(path, base, dtype=precision, attn_implementation=attn_implementation)
    if not isinstance(loaded.model, QScorerForScoring):
        raise CheckpointError(
            f"{path} stands on another backbone: training starts there from model.backbone (of a merged folder, too)"
        )
    config = loaded.model.config
    found = (config.formulation, len(config.quality_token_ids), config.regressor)
    wanted = (formulation.name, formulation.levels, formulation.regressor)
    if found != wanted:
        raise CheckpointError(
            f"{path} was trained with (formulation, levels, regressor) = {found}, the configuration asks for {wanted}; "
            "change the configuration, or start from a base"
        )
    return StartingPoint(loaded.model, loaded.tokenizer)


def start_new(
    architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase, formulation: Formulation
) -> StartingPoint:
    """A network of the given `QScorerConfig` fields with random weights (draws from torch's global generator).

    Raises:
        CheckpointError: fields that do not fit together, or a tokenizer without the level words.
    """
    try:
        config = QScorerConfig(**architecture)
        config.vocab_size = len(tokenizer)
        _add_quality_tokens(config, tokenizer, formulation)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        model = QScorerForScoring(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"architecture does not make a Q-Scorer: {error}") from error
    use_fast_linear(model)
    return StartingPoint(model, tokenizer, list(config.vision_config.stages))


def _start_from_base(
    folder: CheckpointFolder, formulation: Formulation, dtype: torch.dtype, attn_implementation: str
) -> StartingPoint:
    tokenizer = load_tokenizer(folder.path)
    config = QScorerConfig.from_published(folder.config)
    old_rows = config.vocab_size
    _add_quality_tokens(config, tokenizer, formulation)
    config._attn_implementation, config.dtype = attn_implementation, dtype
    model = empty_model(config)
    filler = WeightFiller(model, dtype)
    for shard in weight_shards(folder.path):
        filler.take(_with_new_rows(read_shard(shard), old_rows, config.vocab_size))
    filler.finish(folder, may_lack=REGRESSOR_PREFIX)
    for module in model.deepmlp.modules():
        if isinstance(module, nn.Linear) and module.weight.is_meta:
            weight = torch.empty(module.weight.shape, dtype=dtype).normal_(0.0, config.initializer_range)
            module.weight = nn.Parameter(weight)
            module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=dtype))
    use_fast_linear(model)
    return StartingPoint(model, tokenizer)


def _with_new_rows(tensors: Iterator[tuple[str, Tensor]], old: int, new: int) -> Iterator[tuple[str, Tensor]]:
    """The same tensors with the vocabulary tables extended from `old` to `new` rows."""
    for name, tensor in tensors:
        if name in VOCABULARY_TABLES and len(tensor) == old and new > old:
            if name == VOCABULARY_TABLES[0]:
                rows = torch.empty(new - old, tensor.shape[1]).normal_(0.0, 0.02)
            else:
                rows = tensor.float().mean(dim=0).expand(new - old, -1)
            tensor = torch.cat([tensor, rows.to(tensor.dtype)])
        yield name, tensor


def _add_quality_tokens(config: QScorerConfig, tokenizer: PreTrainedTokenizerBase, formulation: Formulation) -> None:
    """Enter the score tokens or level words into the configuration, and new ones into tokenizer and vocabulary size."""
    config.formulation, config.regressor = formulation.name, formulation.regressor
    if formulation.regressor_hidden_sizes is not None:
        config.regressor_hidden_sizes = list(formulation.regressor_hidden_sizes)
    if formulation.name == "score_token":
        config.score_tokens = score_tokens(formulation.levels)
        tokenizer.add_tokens(config.score_tokens, special_tokens=True)
        config.score_token_ids = [int(tokenizer.get_vocab().get(token, -1)) for token in config.score_tokens]
        config.vocab_size = max(config.vocab_size, *(index + 1 for index in config.score_token_ids))
        return
    config.level_tokens = [f"▁{word}" for word in formulation.words]
    config.level_token_ids = [int(tokenizer.get_vocab().get(token, -1)) for token in config.level_tokens]
    unknown = [word for word, index in zip(formulation.words, config.level_token_ids, strict=True) if index < 0]
    if unknown:
        raise CheckpointError(f"level_words must be single tokens of the tokenizer, not so: {', '.join(unknown)}")
