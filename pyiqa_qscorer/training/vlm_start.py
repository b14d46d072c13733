"""A run that starts from an image-text-to-text model of transformers: adapters, new token rows, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..checkpoints import CheckpointSource
from ..checkpoints.vlm_checkpoint import base_fingerprint, load_base, load_processor, make_room, peft_quiet
from ..data.opinions import HIGH, LOW
from ..errors import CheckpointError, TrainingFailedError
from ..images.model_images import WholePictures
from ..model.vlm import VlmConfig, VlmQScorer
from ..model.vlm_inputs import ChatPrompt, VlmInputs
from ..prompt import score_tokens
from ..registry import BACKBONES
from .batches import batched_opinions
from .config import TrainConfig
from .starting_model import Start, refuse_quantising_on_cpu, widen_trained

if TYPE_CHECKING:
    from peft import PeftModel


def start_from_backbone(config: TrainConfig) -> Start:
    """The network of `model.backbone`: what is not an adapter, a new token or the regressor stays frozen.

    New input rows are N(0, 0.02), new output rows the mean of the old ones, the regressor's weights N(0, 0.02) with
    zero biases, as the published training has them; a row that is both is the mean plus N(0, 0.02). Other than there,
    the first scores are the middle of the scale: from 0, short runs spend most of their steps on the way up.

    Raises:
        CheckpointError, DownloadError: the backbone cannot be had, or is none.
        TrainingFailedError: no layer has the names in `lora.target_modules`.
    """
    model, half = config.model, config.training.precision != "float32"
    place = BACKBONES.get(str(model.backbone), str(model.backbone))
    path = CheckpointSource(place, revision=model.revision).fetch()[0]
    encode = load_processor(path, model.processor)
    tokenizer = encode.processor.tokenizer
    if model.formulation == "score_token":
        tokens = score_tokens(model.levels)
        tokenizer.add_tokens(tokens, special_tokens=True)
    else:
        tokens = [f" {word}" for word in model.level_words]
    prompts = [encode.prompt(prompt, tokens) for prompt in model.prompts]
    bits = config.lora.quantise_base
    if bits:
        refuse_quantising_on_cpu(config)
    dtype = getattr(torch, config.training.precision) if half else torch.float32
    base = load_base(path, dtype, model.attn_implementation, torch.device("cuda" if bits else "cpu"), bits)
    settings = VlmConfig(
        base=place if not Path(place).is_dir() else str(Path(place).absolute()),
        quality_tokens=tokens,
        quality_token_ids=encode.quality_ids(tokens),
        formulation=model.formulation,
        regressor=model.regressor,
        prompt=model.prompts[0],
        base_revision=path.name if path.parent.name == "snapshots" else None,
        base_fingerprint=base_fingerprint(path),
    )
    if model.regressor_hidden_sizes is not None:
        settings.regressor_hidden_sizes = list(model.regressor_hidden_sizes)
    if settings.score_tokens:
        make_room(base, settings.quality_token_ids)
        _initialise_rows(base, settings.quality_token_ids)
    try:
        network = VlmQScorer(base, encode, settings)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    for module in network.deepmlp.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    nn.init.constant_(network.deepmlp.last_layer.bias, (LOW + HIGH) / 2)
    adapters = _with_adapters(network, config)
    network.deepmlp.requires_grad_(config.trainable.regressor and model.formulation == "score_token")
    widen_trained(network)
    collator = VlmCollator(encode, prompts, settings.quality_token_ids)
    return Start(network, tokenizer, adapters, WholePictures(), prompts[0], collator)


@torch.no_grad()
def _initialise_rows(base: Any, ids: Sequence[int]) -> None:
    given, told = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    old = told[: min(ids)].float()
    mean, noise = old.mean(dim=0), torch.randn(len(ids), given.shape[1]) * 0.02
    given[list(ids)] = noise.to(given)
    told[list(ids)] = (mean + (noise.to(mean) if told is given else 0)).expand(len(ids), -1).to(told)


def _with_adapters(network: VlmQScorer, config: TrainConfig) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    base: Any = network.base
    lora = config.lora.model_dump(exclude={"enabled", "quantise_base", "modules_to_save"})
    if "target_modules" not in config.lora.model_fields_set:
        lora["target_modules"] = rf"{_name_of(base, base.get_decoder())}\..*\.(q_proj|v_proj)"
    rows: Any = None
    if ids := network.config.quality_token_ids if network.config.score_tokens else []:
        tables = [base.get_input_embeddings(), base.get_output_embeddings()]
        if tables[0].weight is tables[1].weight:
            tables.pop()  # peft follows what is tied
        rows = {_name_of(base, table): ids for table in tables}
    modules = config.lora.modules_to_save or None
    try:
        settings = LoraConfig(**lora, bias="none", trainable_token_indices=rows, modules_to_save=modules)
        with peft_quiet():
            return cast("PeftModel", get_peft_model(base, settings))
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, part in base.named_modules() if isinstance(part, nn.Linear)})
        raise TrainingFailedError(
            f"lora.target_modules or lora.modules_to_save fit no layer ({error}); linear layers of this backbone end "
            f"in {', '.join(names)}"
        ) from error


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


@dataclass
class VlmCollator:
    """Samples -> batch: processor inputs with the answer behind them, as `batches.Collator` does it for squares."""

    encode: VlmInputs
    prompts: Sequence[ChatPrompt]
    quality_ids: Sequence[int]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        opinions, levels = batched_opinions(samples, len(self.quality_ids))
        prompts = [self.prompts[sample["text"]] for sample in samples]
        inputs = self.encode([sample["pixel_values"] for sample in samples], prompts)
        return {
            **self.encode.with_answer(inputs, prompts, [self.quality_ids[level] for level in levels]),
            **opinions,
        }
