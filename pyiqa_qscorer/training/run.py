"""One training run from a configuration: model, adapters, data, loop, and the checkpoints it leaves."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from .. import __version__
from ..checkpoints import SavedLayout, download_checkpoint, save_folder, save_lora_folder
from ..checkpoints.loading import load_tokenizer, quantise
from ..checkpoints.starting import Formulation, StartingPoint, start_from_checkpoint, start_new
from ..model import QScorerForScoring
from ..model.gradient_checkpointing import enable_gradient_checkpointing
from ..opinions import NamedDatasets
from .backbone import CachedStatistics, fit_standardisation, load_backbone
from .card import model_card
from .config import DataConfig, DatasetConfig, TrainConfig
from .data import Collator, LabelledImages, QualityDataset, read_dataset, refuse_overlap, scale_facts
from .synthetic import CALIBRATION_FILE, CompareToReference, Recipe, find_photos, render
from .text import TrainingText, training_text
from .tokenizer import prompt_tokenizer
from .trainer import QScorerTrainer, TrainingFailedError, evaluation_metrics, last_complete_state

if TYPE_CHECKING:
    from peft import PeftModel

    from ..model.features import FeatureEncoder

logger = logging.getLogger("pyiqa_qscorer")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class TrainingResult:
    """What a run left.

    Attributes:
        folders: written checkpoints by layout.
        metrics: of the best state on the validation data; empty without any.
        finished: False where a signal stopped the run; nothing but resumable states was written then.
    """

    folders: dict[str, Path]
    metrics: dict[str, float]
    finished: bool


def train(
    config: TrainConfig,
    resume: bool = True,
    named_datasets: NamedDatasets | None = None,
    compare: CompareToReference | None = None,
) -> TrainingResult:
    """Train as configured and write the checkpoints into `config.output`.

    Args:
        resume: go on from the newest complete state in `config.output`, if there is one. A resumed run gives the same
            losses as one that was not interrupted.
        named_datasets: opens datasets given by name; `pyiqa_qscorer.plugin.datasets.pyiqa_dataset` for those of pyiqa.
        compare: full-reference metrics for the labels of synthetic chains;
            `pyiqa_qscorer.plugin.reference_metrics.ReferenceMetrics(REFERENCE_METRICS)`.

    Raises:
        SyntheticDataError, TrainingDataError, CheckpointError, DownloadError: what the configuration names cannot be
            used.
        TrainingFailedError: no memory, no disk, or a loss that is not finite; the last complete state stays.
    """
    output = config.output
    output.mkdir(parents=True, exist_ok=True)
    state = last_complete_state(output)
    if state is not None and not resume:
        raise TrainingFailedError(f"output {output} holds the run {state.name}: resume it, or use a new folder")
    set_seed(config.optimisation.seed)
    needs_std = config.objective.needs_std(config.model.formulation)
    data, names = _with_rendered(config, compare), named_datasets
    train_parts = [read_dataset(part, "train", data.on_error, needs_std, names) for part in data.train]
    validation_parts = [read_dataset(part, "val", data.on_error, False, names) for part in data.validation]
    if not data.allow_overlap:
        refuse_overlap(train_parts, validation_parts)
    for part in (*train_parts, *validation_parts):
        for path, reason in part.skipped:
            logger.warning("dataset %s: left out %s: %s", part.name, path, reason)
    start = _starting_point(config)
    texts = _texts(config, start)
    adapters = _choose_trained(start.model, config)
    trainer = _trainer(config, start, texts, train_parts, validation_parts)
    try:
        trainer.train(resume_from_checkpoint=None if state is None else str(state))
    except torch.OutOfMemoryError as error:
        raise TrainingFailedError(
            f"not enough memory ({error}); lower optimisation.batch_size and raise optimisation.gradient_accumulation, "
            "turn on model.gradient_checkpointing, train fewer parts (trainable.*), or set lora.quantise_base: 4bit"
        ) from error
    except (OSError, SafetensorError) as error:
        if not _disk_is_full(error):
            raise
        raise TrainingFailedError(
            f"the disk of {output} is full ({error}); make room and run the same command again: it goes on from "
            f"{getattr(last_complete_state(output), 'name', 'the start')}"
        ) from error
    finished = trainer.state.global_step >= trainer.state.max_steps
    if not finished:
        return TrainingResult({}, {}, False)
    metrics = trainer.evaluate(metric_key_prefix="validation") if validation_parts else {}
    folders: dict[str, Path] = {}
    if trainer.is_world_process_zero():
        facts = _facts(config, trainer, train_parts, validation_parts, metrics)
        folders = _write(config, start, adapters, facts)
    return TrainingResult(folders, metrics, True)


def _with_rendered(config: TrainConfig, compare: CompareToReference | None) -> DataConfig:
    """The data with every synthetic dataset rendered, as the folder and table it became."""
    root = _rendered_folder(config)

    def rendered(part: DatasetConfig, name: str) -> DatasetConfig:
        if part.synthetic is None:
            return part
        recipe = Recipe(part.synthetic, part.count, part.type_shares, seed=part.seed)
        photos = find_photos([config.data.photos / folder for folder in part.photos])
        folder = root / f"{name}_{part.synthetic}"
        with tqdm(total=part.count, desc=f"rendering {folder.name}", unit="picture") as bar:
            table = render(
                *(recipe, photos, folder, compare, root / CALIBRATION_FILE),
                workers=config.data.render_workers,
                progress=lambda done, total: bar.update(done - bar.n),
            )
        return DatasetConfig(
            folder=folder / "images", csv=table, std_column="std", mos_range=(1, 5), weight=part.weight
        )

    def all_rendered(parts: list[DatasetConfig], name: str) -> list[DatasetConfig]:
        return [rendered(part, f"{name}{number}") for number, part in enumerate(parts)]

    return config.data.model_copy(
        update={
            "train": all_rendered(config.data.train, "train"),
            "validation": all_rendered(config.data.validation, "validation"),
        }
    )


def _rendered_folder(config: TrainConfig) -> Path:
    return config.data.rendered or config.output / "rendered"


def _disk_is_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    return any(f"os error {number}" in str(error) for number in FULL_DISK)  # safetensors keeps it in the text only


def _formulation(config: TrainConfig) -> Formulation:
    model = config.model
    return Formulation(
        model.formulation, model.levels, model.level_words, model.regressor, model.regressor_hidden_sizes
    )


def _from_checkpoint(config: TrainConfig, dtype: torch.dtype) -> StartingPoint:
    model = config.model
    assert model.checkpoint is not None  # by validation, where there is no architecture
    folders = download_checkpoint(
        model.checkpoint, model.base, revision=model.revision, base_revision=model.base_revision
    )
    base = folders[1] if len(folders) > 1 else None
    return start_from_checkpoint(folders[0], base, _formulation(config), dtype, model.attn_implementation)


def _starting_point(config: TrainConfig) -> StartingPoint:
    model = config.model
    if model.architecture is not None:
        tokenizer = prompt_tokenizer(model.level_words) if model.tokenizer is None else load_tokenizer(model.tokenizer)
        start = start_new(model.architecture, tokenizer, _formulation(config))
        if model.backbone_weights is not None:
            if start.model.config.vision_config.kind != "features":
                raise TrainingFailedError(
                    "model.backbone_weights needs an architecture with vision_config.kind: features"
                )
            load_backbone(start.model.model.vision_model, model.backbone_weights)
    else:
        # Frozen weights stay in 16 bit; what trains is widened to float32 below.
        half = config.lora.enabled and config.optimisation.precision != "float32"
        start = _from_checkpoint(config, getattr(torch, config.optimisation.precision) if half else torch.float32)
        if config.lora.quantise_base is not None:
            if config.device == "cpu" or not torch.cuda.is_available():
                raise TrainingFailedError(
                    "lora.quantise_base needs a CUDA GPU: on the CPU bitsandbytes gives wrong gradients; remove it"
                )
            start.model = quantise(start.model, config.lora.quantise_base, "cuda")
    start.model.config.prompt = model.prompts[0]
    return start


def _texts(config: TrainConfig, start: StartingPoint) -> list[TrainingText]:
    network = start.model.config
    tokens = network.score_tokens or [word.removeprefix("▁") for word in network.level_tokens]
    return [training_text(start.tokenizer, prompt, tokens[0]) for prompt in config.model.prompts]


def _choose_trained(model: QScorerForScoring, config: TrainConfig) -> PeftModel | None:
    """Freeze everything but what the configuration trains; put adapters in."""
    trainable, adapters = config.trainable, None
    model.requires_grad_(trainable.everything)
    if config.lora.enabled and not trainable.everything:
        from peft import LoraConfig, get_peft_model  # takes seconds, and not every run has adapters

        settings = LoraConfig(
            r=config.lora.r,
            lora_alpha=cast(int, config.lora.alpha),
            lora_dropout=config.lora.dropout,
            target_modules=config.lora.targets,
            bias="none",
        )
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
    if backbone is None and not trainable.vision_backbone:
        raise TrainingFailedError("trainable.vision_backbone: false needs vision_config.kind: features")
    if backbone is None and config.optimisation.vision_backbone_learning_rate is not None:
        raise TrainingFailedError("optimisation.vision_backbone_learning_rate needs vision_config.kind: features")
    if backbone is not None and not trainable.vision_backbone:
        backbone.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # steps of 2e-5 vanish in 16 bit
    return adapters


def _trainer(
    config: TrainConfig,
    start: StartingPoint,
    texts: list[TrainingText],
    train_parts: list[LabelledImages],
    validation_parts: list[LabelledImages],
) -> QScorerTrainer:
    settings, network = config.optimisation, start.model.config
    size = network.vision_config.image_size
    data: Any = QualityDataset(train_parts, size, len(texts), config.data.flip, settings.seed)
    validation: Any = QualityDataset(validation_parts, size) if validation_parts else None
    if network.vision_config.kind == "features":
        encoder = cast("FeatureEncoder", start.model.model.vision_model)
        if config.data.cache_statistics:
            data, validation = (
                None if images is None else CachedStatistics(images, encoder, _rendered_folder(config) / "statistics")
                for images in (data, validation)
            )
        if config.model.architecture is not None:
            fit_standardisation(encoder, data)
    arguments = TrainingArguments(
        output_dir=str(config.output),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient_norm,
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        seed=settings.seed,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="epoch",
        save_total_limit=settings.keep,
        eval_strategy="epoch" if validation is not None else "no",
        load_best_model_at_end=validation is not None,
        metric_for_best_model=settings.best_by if validation is not None else None,
        greater_is_better=True if validation is not None else None,
        dataloader_num_workers=config.data.workers,
        remove_unused_columns=False,
        label_names=["mos"],
        ddp_find_unused_parameters=False,
        use_cpu=config.device == "cpu",
        report_to=["tensorboard"],
        deepspeed=None if settings.deepspeed is None else str(settings.deepspeed),
        fsdp=settings.fsdp,
        fsdp_config=None if settings.fsdp_settings is None else str(settings.fsdp_settings),
    )
    if config.model.gradient_checkpointing:
        enable_gradient_checkpointing(start.model)
    return QScorerTrainer(
        save_steps=settings.save_steps,
        vision_backbone_rate=settings.vision_backbone_learning_rate,
        model=start.model,
        args=arguments,
        train_dataset=data,
        eval_dataset=validation,
        data_collator=Collator(texts, network.quality_token_ids),
        compute_metrics=evaluation_metrics,
        objective=config.objective,
        prompt=texts[0].prompt,
    )


def _facts(
    config: TrainConfig,
    trainer: QScorerTrainer,
    train_parts: list[LabelledImages],
    validation_parts: list[LabelledImages],
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Content of `training.json`."""
    return {
        "configuration": json.loads(config.model_dump_json()),
        "data": {"train": scale_facts(train_parts), "validation": scale_facts(validation_parts)},
        "metrics": metrics,
        "best_state": trainer.state.best_model_checkpoint and Path(trainer.state.best_model_checkpoint).name,
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "device": trainer.args.device.type,
        "versions": {
            "python": platform.python_version(),
            "pyiqa-qscorer": __version__,
            **{name: version(name) for name in ("torch", "transformers", "peft", "pyiqa", "pillow", "numpy")},
        },
        "curves": trainer.state.log_history,
    }


def _write(
    config: TrainConfig, start: StartingPoint, adapters: PeftModel | None, facts: dict[str, Any]
) -> dict[str, Path]:
    """Write the asked-for layouts, each with `training.json` and a model card."""
    folders: dict[str, Path] = {}
    start.model.config.training_data = facts["data"]
    dtype = torch.float32 if config.optimisation.precision == "float32" else torch.float16
    if "published_lora" in config.layouts:
        folders["published_lora"] = save_lora_folder(_target(config.output, "published_lora"), start.model, adapters)
    others = tuple(layout for layout in get_args(SavedLayout) if layout in config.layouts)
    if others:
        model = _merged(config, start.model, dtype)
        for layout in others:
            folders[layout] = save_folder(
                _target(config.output, layout),
                model,
                start.tokenizer,
                layout=layout,
                tokenizer_source=_tokenizer_folder(start.tokenizer),
            )
    for layout, folder in folders.items():
        (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (folder / "MODEL_CARD.md").write_text(model_card(facts, layout), encoding="utf-8")
    return folders


def _merged(config: TrainConfig, trained: QScorerForScoring, dtype: torch.dtype) -> QScorerForScoring:
    """The trained model without adapters, in `dtype`.

    Frozen weights are read from the starting checkpoint again: training may have held them in bfloat16 or quantised,
    and what was not trained must come out as it went in.
    """
    if config.model.architecture is not None:
        return nn.Module.to(trained, dtype)
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = _from_checkpoint(config, dtype).model
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
