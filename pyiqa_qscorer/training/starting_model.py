"""The model that a run starts from, a base, a model that scores already or a new network; and what of it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..checkpoints import CheckpointFolder, CheckpointSource, Layout, load_folder, recognise
from ..checkpoints.layouts import weight_shards
from ..checkpoints.load import empty_model, load_tokenizer, quantise
from ..checkpoints.weights import WeightFiller, read_shard
from ..errors import CheckpointError, TrainingFailedError
from ..images.model_images import ModelImages, SquareImages
from ..model import QScorerConfig, QScorerForScoring, QScorerVisionConfig
from ..model.fast_linear import use_fast_linear
from ..model.vlm import VlmQScorer
from ..prompt import score_tokens
from ..registry import METRICS
from .batches import Collator
from .cached_statistics import load_backbone
from .config import ModelConfig, TrainConfig
from .text import training_text
from .tokenizer import prompt_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

    from ..model.features import FeatureEncoder

VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass
class Start:
    """A network to train, and what goes with it.

    Attributes:
        adapters: inside the model, where there are any.
        images: how pictures become samples.
        prompt: for the evaluation.
        collator: samples -> batch.
        new_stages: of a feature network, which the model has not been trained to read.
    """

    model: QScorerForScoring | VlmQScorer
    tokenizer: PreTrainedTokenizerBase
    adapters: PeftModel | None
    images: ModelImages
    prompt: Any
    collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]
    new_stages: Sequence[int] = ()


def starting_point(config: TrainConfig) -> Start:
    """What a run on the published network starts from: the checkpoint, or a new network; with what trains chosen.

    Raises:
        CheckpointError, DownloadError, TrainingFailedError: what the configuration names cannot be used.
    """
    settings = config.model
    new_stages: list[int] = []
    if settings.architecture is not None:
        own = settings.tokenizer
        tokenizer = prompt_tokenizer(settings.level_words) if own is None else load_tokenizer(own)
        model = new_network(settings, tokenizer)
        new_stages = list(model.config.vision_config.stages)
        if settings.backbone_weights:
            _refuse_without_features(model, "backbone_weights")
        for source in settings.backbone_weights:
            load_backbone(model.model.vision_model, source)
    else:
        # Frozen weights stay in 16 bit; what trains is widened to float32 below.
        half = config.lora.enabled and not config.trainable.everything and config.training.precision != "float32"
        model, tokenizer = from_checkpoint(config, getattr(torch, config.training.precision) if half else torch.float32)
        if config.lora.quantise_base is not None:
            refuse_quantising_on_cpu(config)
            model = quantise(model, config.lora.quantise_base, "cuda")
        if settings.vision is not None:
            had = model.config.vision_config.stages
            model = with_changed_vision(model, settings.vision, settings.backbone_weights)
            new_stages = [stage for stage in model.config.vision_config.stages if stage not in had]
    network = model.config
    network.prompt = settings.prompts[0]
    tokens = network.score_tokens or [word.removeprefix("▁") for word in network.level_tokens]
    texts = [training_text(tokenizer, prompt, tokens[0]) for prompt in settings.prompts]
    adapters = _choose_trained(model, config)
    images = SquareImages(network.vision_config.image_size, network.vision_config.image_fit)
    collator = Collator(texts, network.quality_token_ids)
    return Start(model, tokenizer, adapters, images, texts[0].prompt, collator, new_stages)


def refuse_quantising_on_cpu(config: TrainConfig) -> None:
    if config.training.use_cpu or not torch.cuda.is_available():
        raise TrainingFailedError(
            "lora.quantise_base needs a CUDA GPU: on the CPU bitsandbytes gives wrong gradients; remove it"
        )


def from_checkpoint(config: TrainConfig, dtype: torch.dtype) -> tuple[QScorerForScoring, PreTrainedTokenizerBase]:
    """Model and tokenizer of `model.checkpoint`, downloaded if need be, in `dtype`.

    A base (mPLUG-Owl2 as published) gets new vocabulary rows and the regressor as the published training gives them:
    input rows N(0, 0.02), output rows the mean of the old ones, regressor weights N(0, 0.02) with zero biases.

    Raises:
        CheckpointError: unreadable, or trained with another formulation, number of levels or regressor.
        DownloadError: it cannot be fetched.
    """
    model = config.model
    assert model.checkpoint is not None  # by validation, where there is no architecture
    checkpoint, base = model.checkpoint, model.base
    if checkpoint in METRICS and not Path(checkpoint).exists():
        options = METRICS[checkpoint].options
        checkpoint, base = options["checkpoint"], base or options.get("base")
    folders = CheckpointSource(checkpoint, base, model.revision, model.base_revision).fetch()
    folder = recognise(*folders)
    if folder.layout is Layout.PUBLISHED_MERGED and not folder.config.get("score_token_id"):
        return _from_base(folder, model, dtype)
    precision: Any = str(dtype).removeprefix("torch.")
    loaded = load_folder(*folders, dtype=precision, attn_implementation=model.attn_implementation)
    if not isinstance(loaded.model, QScorerForScoring):
        raise CheckpointError(
            f"{folders[0]} stands on another backbone: training starts there from model.backbone (of a merged folder, "
            "too)"
        )
    network = loaded.model.config
    found = (network.formulation, len(network.quality_token_ids), network.regressor)
    wanted = (model.formulation, model.levels, model.regressor)
    if found != wanted:
        raise CheckpointError(
            f"{folders[0]} was trained with (formulation, levels, regressor) = {found}, the configuration asks for "
            f"{wanted}; change the configuration, or start from a base"
        )
    return loaded.model, loaded.tokenizer


def _from_base(
    folder: CheckpointFolder, settings: ModelConfig, dtype: torch.dtype
) -> tuple[QScorerForScoring, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(folder.path)
    config = QScorerConfig.from_published(folder.config)
    old_rows = config.vocab_size
    _add_quality_tokens(config, tokenizer, settings)
    config._attn_implementation, config.dtype = settings.attn_implementation, dtype
    model = empty_model(config)
    filler = WeightFiller(model, dtype)
    for shard in weight_shards(folder.path):
        filler.take(_with_new_rows(read_shard(shard), old_rows, config.vocab_size))
    filler.finish(folder, may_lack="deepmlp.")
    for module in model.deepmlp.modules():
        if isinstance(module, nn.Linear) and module.weight.is_meta:
            weight = torch.empty(module.weight.shape, dtype=dtype).normal_(0.0, config.initializer_range)
            module.weight = nn.Parameter(weight)
            module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=dtype))
    use_fast_linear(model)
    return model, tokenizer


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


def new_network(settings: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> QScorerForScoring:
    """A network of `settings.architecture` with random weights; its score tokens are added to the tokenizer.

    Raises:
        CheckpointError: fields that do not fit together, or a tokenizer without the level words.
    """
    try:
        config = QScorerConfig(**settings.architecture or {})
        config.vocab_size = len(tokenizer)
        _add_quality_tokens(config, tokenizer, settings)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        model = QScorerForScoring(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"architecture does not make a Q-Scorer: {error}") from error
    use_fast_linear(model)
    return model


def _add_quality_tokens(config: QScorerConfig, tokenizer: PreTrainedTokenizerBase, settings: ModelConfig) -> None:
    """Enter the score tokens or level words into the configuration, and new ones into tokenizer and vocabulary size."""
    config.formulation, config.regressor = settings.formulation, settings.regressor
    if settings.regressor_hidden_sizes is not None:
        config.regressor_hidden_sizes = list(settings.regressor_hidden_sizes)
    if settings.formulation == "score_token":
        config.score_tokens = score_tokens(settings.levels)
        tokenizer.add_tokens(config.score_tokens, special_tokens=True)
        config.score_token_ids = [int(tokenizer.get_vocab().get(token, -1)) for token in config.score_tokens]
        config.vocab_size = max(config.vocab_size, *(index + 1 for index in config.score_token_ids))
        return
    config.level_tokens = [f"▁{word}" for word in settings.level_words]
    config.level_token_ids = [int(tokenizer.get_vocab().get(token, -1)) for token in config.level_tokens]
    unknown = [word for word, index in zip(settings.level_words, config.level_token_ids, strict=True) if index < 0]
    if unknown:
        raise CheckpointError(f"level_words must be single tokens of the tokenizer, not so: {', '.join(unknown)}")


def with_changed_vision(
    model: QScorerForScoring, changes: dict[str, Any], backbone_weights: list[str]
) -> QScorerForScoring:
    """A network that reads more stages of its feature network, or takes pictures of another fit or size.

    Channels of new stages enter with zero weights, so before training the scores are those of `model` for the same
    pixels. They are not standardised yet: see `fit_standardisation`.

    Args:
        changes: fields of its `vision_config`.
        backbone_weights: see `load_backbone`; the model's own go over them.

    Raises:
        TrainingFailedError: no feature network, a field that cannot be changed, a value outside its rule, or stages
            that the model reads and the changes leave out.
    """
    _refuse_without_features(model, "vision")
    before = model.config.vision_config
    if odd := sorted(changes.keys() - {"stages", "image_fit", "smallest_side"}):
        raise TrainingFailedError(f"model.vision can change stages, image_fit and smallest_side, got {odd[0]}")
    config = cast(QScorerConfig, copy.deepcopy(model.config))
    try:
        config.vision_config = QScorerVisionConfig(**{**before.to_dict(), **changes})
        if not set(before.stages) <= set(config.vision_config.stages):
            raise ValueError(f"stages must keep {list(before.stages)}, got {changes['stages']}")
        changed = QScorerForScoring(config)
    except (TypeError, ValueError) as error:
        raise TrainingFailedError(f"model.vision does not make a vision encoder: {error}") from error
    new = changed.model.vision_model
    for source in backbone_weights:
        load_backbone(new, source)
    channels = torch.tensor(new.columns_of(before.stages))
    values = changed.state_dict()
    for name, value in model.state_dict().items():
        if values[name].shape == value.shape:
            values[name] = value
        else:  # of the statistics: the last axis counts channels
            wide = torch.ones_like(values[name]) if name.endswith("scale") else torch.zeros_like(values[name])
            wide[..., channels] = value
            values[name] = wide
    changed.load_state_dict(values)
    use_fast_linear(changed)
    return changed


def _refuse_without_features(model: QScorerForScoring, setting: str) -> None:
    if model.config.vision_config.kind != "features":
        raise TrainingFailedError(f"model.{setting} needs a vision encoder of kind: features")


def _choose_trained(model: QScorerForScoring, config: TrainConfig) -> PeftModel | None:
    """Freeze everything but what the configuration trains; put adapters in."""
    trainable, adapters = config.trainable, None
    model.requires_grad_(trainable.everything)
    if config.lora.enabled and not trainable.everything:
        from peft import LoraConfig, get_peft_model  # takes seconds, and not every run has adapters

        settings = LoraConfig(**config.lora.model_dump(exclude={"enabled", "quantise_base"}), bias="none")
        adapters = cast("PeftModel", get_peft_model(model, settings))
    inner = model.model
    parts = {"vision_model": inner.vision_model, "visual_abstractor": inner.visual_abstractor}
    parts |= {"embed_tokens": inner.embed_tokens, "lm_head": model.lm_head, "regressor": model.deepmlp}
    for name, part in parts.items():
        if getattr(trainable, name):
            part.requires_grad_(True)
    backbone = getattr(model.model.vision_model, "backbone", None)
    given = {
        "trainable.vision_backbone: false": not trainable.vision_backbone,
        "trainable.frozen_stages": trainable.frozen_stages > 0,
        "training.vision_backbone_learning_rate": config.training.vision_backbone_learning_rate is not None,
    }
    for setting, is_given in given.items():
        if is_given and backbone is None:
            raise TrainingFailedError(f"{setting} needs vision_config.kind: features")
    if backbone is not None:
        encoder = cast("FeatureEncoder", model.model.vision_model)
        stages = trainable.frozen_stages
        for parameter in _lowest(encoder, stages) if trainable.vision_backbone else backbone.parameters():
            parameter.requires_grad_(False)
    widen_trained(model)
    return adapters


def _lowest(encoder: FeatureEncoder, stages: int) -> list[nn.Parameter]:
    """Parameters of the first stages of a feature network, whose modules are registered in the order they compute."""
    if not stages:
        return []
    if stages > (known := encoder.indices[-1] + 1):
        raise TrainingFailedError(f"trainable.frozen_stages must be at most {known}, as many as are read, got {stages}")
    last = f"{encoder.backbone.feature_info[stages - 1]['module']}."
    named = list(encoder.backbone.named_parameters())
    count = max(index + 1 for index, (name, _) in enumerate(named) if name.startswith(last))
    return [parameter for _, parameter in named[:count]]


def widen_trained(model: nn.Module) -> None:
    """What trains in float32: steps of 2e-5 vanish in 16 bit."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
