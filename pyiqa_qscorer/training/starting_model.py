"""The model that a run starts from, and which of its parameters train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..checkpoints import CheckpointSource
from ..checkpoints.load import load_tokenizer, quantise
from ..checkpoints.start import Formulation, StartingPoint, start_from_checkpoint, start_new
from ..errors import TrainingFailedError
from ..model import QScorerConfig, QScorerForScoring, QScorerVisionConfig
from ..model.fast_linear import use_fast_linear
from ..registry import METRICS
from .cached_statistics import load_backbone
from .config import TrainConfig
from .tokenizer import prompt_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

    from ..model.features import FeatureEncoder


def starting_point(config: TrainConfig) -> StartingPoint:
    """What a run starts from: the checkpoint, or a new network with its pretrained feature network.

    Raises:
        CheckpointError, DownloadError, TrainingFailedError: what the configuration names cannot be used.
    """
    model = config.model
    if model.architecture is not None:
        tokenizer = prompt_tokenizer(model.level_words) if model.tokenizer is None else load_tokenizer(model.tokenizer)
        start = start_new(model.architecture, tokenizer, _formulation(config))
        if model.backbone_weights:
            _refuse_without_features(start.model, "backbone_weights")
        for source in model.backbone_weights:
            load_backbone(start.model.model.vision_model, source)
    else:
        # Frozen weights stay in 16 bit; what trains is widened to float32 below.
        half = config.lora.enabled and not config.trainable.everything and config.training.precision != "float32"
        start = from_checkpoint(config, getattr(torch, config.training.precision) if half else torch.float32)
        if config.lora.quantise_base is not None:
            if config.training.use_cpu or not torch.cuda.is_available():
                raise TrainingFailedError(
                    "lora.quantise_base needs a CUDA GPU: on the CPU bitsandbytes gives wrong gradients; remove it"
                )
            start.model = quantise(start.model, config.lora.quantise_base, "cuda")
        if model.vision is not None:
            had = start.model.config.vision_config.stages
            start.model = with_changed_vision(start.model, model.vision, model.backbone_weights)
            start.new_stages = [stage for stage in start.model.config.vision_config.stages if stage not in had]
    start.model.config.prompt = model.prompts[0]
    return start


def _refuse_without_features(model: QScorerForScoring, setting: str) -> None:
    if model.config.vision_config.kind != "features":
        raise TrainingFailedError(f"model.{setting} needs a vision encoder of kind: features")


def with_changed_vision(
    model: QScorerForScoring, changes: dict[str, Any], backbone_weights: list[str]
) -> QScorerForScoring:
    """A network that reads more stages of its feature network, or takes pictures of another fit or size.

    Channels of new stages enter with zero weights, so before training the scores are those of `model` for the same
    pixels. They are not standardised yet: see `fit_standardisation`.

    Args:
        model: with a feature network.
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


def from_checkpoint(config: TrainConfig, dtype: torch.dtype) -> StartingPoint:
    """Model and tokenizer of `model.checkpoint`, downloaded if need be, in `dtype`."""
    model = config.model
    assert model.checkpoint is not None  # by validation, where there is no architecture
    checkpoint, base = model.checkpoint, model.base
    if checkpoint in METRICS and not Path(checkpoint).exists():
        options = METRICS[checkpoint].options
        checkpoint, base = options["checkpoint"], base or options.get("base")
    folders = CheckpointSource(checkpoint, base, model.revision, model.base_revision).fetch()
    below = folders[1] if len(folders) > 1 else None
    return start_from_checkpoint(folders[0], below, _formulation(config), dtype, model.attn_implementation)


def _formulation(config: TrainConfig) -> Formulation:
    model = config.model
    return Formulation(
        model.formulation, model.levels, model.level_words, model.regressor, model.regressor_hidden_sizes
    )


def choose_trained(model: QScorerForScoring, config: TrainConfig) -> PeftModel | None:
    """Freeze everything but what the configuration trains; put adapters in."""
    trainable, adapters = config.trainable, None
    model.requires_grad_(trainable.everything)
    if config.lora.enabled and not trainable.everything:
        from peft import LoraConfig, get_peft_model  # takes seconds, and not every run has adapters

        settings = LoraConfig(**config.lora.model_dump(exclude={"enabled", "quantise_base"}), bias="none")
        adapters = cast("PeftModel", get_peft_model(model, settings))
    parts = {
        "vision_model": model.model.vision_model,
        "visual_abstractor": model.model.visual_abstractor,
        "embed_tokens": model.model.embed_tokens,
        "lm_head": model.lm_head,
        "regressor": model.deepmlp,
    }
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
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # steps of 2e-5 vanish in 16 bit
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
