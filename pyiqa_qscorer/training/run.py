"""One training run from a configuration: model, adapters, data, loop, and the checkpoints it leaves."""

from __future__ import annotations

import errno
import json
import logging
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import TrainingArguments, set_seed

from .. import __version__
from ..checkpoints.starting import StartingPoint
from ..model.gradient_checkpointing import enable_gradient_checkpointing
from ..opinions import NamedDatasets
from .backbone import CachedStatistics, fit_standardisation
from .config import DataConfig, DatasetConfig, TrainConfig
from .data import Collator, LabelledImages, QualityDataset, read_dataset, refuse_overlap, scale_facts
from .starting_model import choose_trained, starting_point
from .synthetic import CALIBRATION_FILE, CompareToReference, Recipe, find_photos, render
from .text import TrainingText, training_text
from .trainer import QScorerTrainer, TrainingFailedError, evaluation_metrics, last_complete_state
from .writing import write_checkpoints

if TYPE_CHECKING:
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
    start = starting_point(config)
    texts = _texts(config, start)
    adapters = choose_trained(start.model, config)
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
        folders = write_checkpoints(config, start, adapters, facts)
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


def _texts(config: TrainConfig, start: StartingPoint) -> list[TrainingText]:
    network = start.model.config
    tokens = network.score_tokens or [word.removeprefix("▁") for word in network.level_tokens]
    return [training_text(start.tokenizer, prompt, tokens[0]) for prompt in config.model.prompts]


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
