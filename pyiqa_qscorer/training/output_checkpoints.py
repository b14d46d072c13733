"""What a finished run leaves: a checkpoint in each layout asked for, with its history and a model card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..checkpoints import SavedLayout, save_folder, save_lora_folder
from ..checkpoints.save import check_output
from ..checkpoints.start import StartingPoint
from ..model import QScorerForScoring
from .config import TrainConfig
from .model_card import model_card
from .starting_model import from_checkpoint

if TYPE_CHECKING:
    from peft import PeftModel


def write_checkpoints(
    config: TrainConfig, start: StartingPoint, adapters: PeftModel | None, facts: dict[str, Any]
) -> dict[str, Path]:
    """Write the asked-for layouts, each with `training.json` and a model card; those that are there already stay."""
    start.model.config.training_data = facts["data"]
    dtype = torch.float32 if config.optimisation.precision == "float32" else torch.float16
    folders = written_checkpoints(config)
    missing = [layout for layout in config.layouts if layout not in folders]
    history = json.dumps(facts, indent=2) + "\n"

    def notes(layout: str) -> dict[str, str]:
        return {"training.json": history, "MODEL_CARD.md": model_card(facts, layout)}

    if "published_lora" in missing:
        folders["published_lora"] = save_lora_folder(
            _target(config.output, "published_lora"), start.model, adapters, notes("published_lora")
        )
    others = tuple(layout for layout in get_args(SavedLayout) if layout in missing)
    if others:
        model = _merged(config, start.model, dtype)
        for layout in others:
            folders[layout] = save_folder(
                _target(config.output, layout),
                model,
                start.tokenizer,
                layout=layout,
                tokenizer_source=_tokenizer_folder(start.tokenizer),
                notes=notes(layout),
            )
    return folders


def check_targets(config: TrainConfig, start: StartingPoint) -> None:
    """Raise what `write_checkpoints` would, before the training that it would lose.

    Raises:
        CheckpointError: a layout that this network cannot have, a folder in the way, or no `tokenizer.model`.
    """
    written = written_checkpoints(config)
    for layout in config.layouts:
        if layout != "qscorer" and start.model.config.vision_config.kind != "vit":
            start.model.config.to_published()
        if layout not in written:
            published = layout == "published"
            check_output(
                _target(config.output, layout),
                "published" if published else "qscorer",
                _tokenizer_folder(start.tokenizer) if published else None,
            )


def written_checkpoints(config: TrainConfig) -> dict[str, Path]:
    """Folder by layout of what an earlier call wrote; a folder is there only when it is complete."""
    targets = {layout: _target(config.output, layout) for layout in config.layouts}
    return {layout: folder for layout, folder in targets.items() if (folder / "training.json").exists()}


def _merged(config: TrainConfig, trained: QScorerForScoring, dtype: torch.dtype) -> QScorerForScoring:
    """The trained model without adapters, in `dtype`.

    Frozen weights are read from the starting checkpoint again: training may have held them in bfloat16 or quantised,
    and what was not trained must come out as it went in.
    """
    if config.model.architecture is not None:
        return nn.Module.to(trained, dtype)
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = from_checkpoint(config, dtype).model
    model.config.prompt, model.config.training_data = trained.config.prompt, trained.config.training_data
    new_rows = -len(model.config.score_token_ids)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if ".lora_" not in name and (parameter.requires_grad or name.startswith("deepmlp.")):
                model.get_parameter(name.replace(".base_layer", "")).copy_(parameter)
        if new_rows:  # drawn at random when training started
            model.model.embed_tokens.weight[new_rows:] = trained.model.embed_tokens.weight[new_rows:].to(dtype).cpu()
        for name, module in trained.named_modules():
            if isinstance(module, BaseTunerLayer):
                layer: Any = module
                update: Tensor = layer.get_delta_weight("default")  # scaled product of the two factors
                weight = model.get_parameter(f"{name}.weight")
                weight.copy_(weight.float() + update.float().cpu())
    return model


def _target(output: Path, layout: str) -> Path:
    return output / f"checkpoint_{layout}"


def _tokenizer_folder(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    source = tokenizer.name_or_path
    return Path(source) if source and os.path.isdir(source) else None
