"""One training run from a configuration: model, adapters, data, loop, and the checkpoints it leaves."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import TrainingArguments, set_seed

from .. import __version__
from ..errors import TrainingConfigError
from ..files import read_json
from ..model import QScorerForScoring
from ..model.attention import enable_gradient_checkpointing
from .average import mix_in, trained_parameters
from .cached_statistics import CachedStatistics, fit_standardisation
from .config import OURS, TrainConfig
from .dataset import LabelledImages, QualityDataset, read_dataset, refuse_overlap, scale_facts
from .output import check_targets, opened_output, state_to_resume, write_checkpoints, written_checkpoints
from .starting_model import Start, starting_point
from .trainer import QScorerTrainer
from .vlm_start import start_from_backbone

if TYPE_CHECKING:
    from ..model.features import FeatureEncoder

_DECIDING_PACKAGES = ("torch", "transformers", "peft", "pyiqa", "timm", "pillow", "numpy", "scipy")
logger = logging.getLogger("pyiqa_qscorer")
Data = dict[str, list[LabelledImages]]
"""Datasets of `train` and `validation`."""


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


def train(config: TrainConfig, resume: bool = True) -> TrainingResult:
    """Train as configured and write the checkpoints into `config.output`.

    Args:
        resume: go on from the newest complete state in `config.output`, if there is one. A resumed run gives the same
            losses as one that was not interrupted.

    Raises:
        TrainingDataError, CheckpointError, DownloadError, QScorerError: what the configuration names cannot be used;
            nothing has been written then.
        TrainingFailedError: the folder holds a run of another configuration, one whose best state is gone, or another
            process trains into it; no memory, no disk, or a loss that is not finite. The last complete state stays.
    """
    state = state_to_resume(config, resume)
    written = written_checkpoints(config)
    if state is not None and len(written) == len(config.layouts):  # nothing is left to do
        history = read_json(next(iter(written.values())) / "training.json")
        return TrainingResult(written, history["metrics"], True)
    data = _read(config)
    arguments = _arguments(config)
    set_seed(config.training.seed)
    start = starting_point(config) if config.model.backbone is None else start_from_backbone(config)
    check_targets(config, start)
    share, trained = config.training.start_share, trained_parameters(start.model)
    before = {name: value.detach().clone() for name, value in trained.items()} if share else {}
    with opened_output(config):
        state = state_to_resume(config, resume)  # again: only now nobody else can change it
        trainer = _trainer(config, arguments, start, data)
        trainer.train(resume_from_checkpoint=None if state is None else str(state))
        if trainer.state.global_step < trainer.state.max_steps:
            return TrainingResult({}, {}, False)
        average = trainer.average
        mix_in(trained if average is None else average.values, before, share)
        if average is not None:
            average.apply()
        metrics = trainer.evaluate(metric_key_prefix="validation") if data["validation"] else {}
        folders: dict[str, Path] = {}
        if trainer.is_world_process_zero():
            folders = write_checkpoints(config, start, _facts(config, trainer, data, metrics))
        return TrainingResult(folders, metrics, True)


def _read(config: TrainConfig) -> Data:
    needs_std = config.objective.needs_std(config.model.formulation)
    data = {
        "train": [read_dataset(part, "train", config.data.on_error, needs_std) for part in config.data.train],
        "validation": [read_dataset(part, "val", config.data.on_error) for part in config.data.validation],
    }
    for part in chain(*data.values()):
        for path, reason in part.skipped:
            logger.warning("dataset %s: left out %s: %s", part.name, path, reason)
    if not config.data.allow_overlap:
        refuse_overlap(data["train"], data["validation"])
    return data


def _arguments(config: TrainConfig) -> TrainingArguments:
    validated = bool(config.data.validation)
    settings = config.training.model_dump(exclude=OURS)
    settings.setdefault("per_device_eval_batch_size", config.training.per_device_train_batch_size)
    if not validated:
        settings |= {"load_best_model_at_end": False, "metric_for_best_model": None}
    try:
        return TrainingArguments(
            **settings,
            output_dir=str(config.output),
            save_strategy="epoch",
            eval_strategy="epoch" if validated else "no",
            greater_is_better=True if validated else None,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            label_names=["mos"],
            ddp_find_unused_parameters=False,
        )
    except (TypeError, ValueError) as error:
        raise TrainingConfigError(f"training: transformers refuses these settings: {error}") from error


def _trainer(config: TrainConfig, arguments: TrainingArguments, start: Start, parts: Data) -> QScorerTrainer:
    sample = start.images.sample
    seed, texts = config.training.seed, len(config.model.prompts)
    data: Any = QualityDataset(parts["train"], sample, texts, config.data.flip, seed)
    validation: Any = QualityDataset(parts["validation"], sample) if parts["validation"] else None
    model = start.model
    if isinstance(model, QScorerForScoring) and model.config.vision_config.kind == "features":
        encoder = cast("FeatureEncoder", model.model.vision_model).to(arguments.device)
        if config.data.cache_statistics:
            folder = config.data.statistics or config.output / "statistics"
            workers = max(1, config.training.dataloader_num_workers)
            data, validation = (
                None if images is None else CachedStatistics(images, encoder, folder, workers)
                for images in (data, validation)
            )
        if start.new_stages:
            fit_standardisation(encoder, data, start.new_stages)
    if config.model.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return QScorerTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=validation,
        data_collator=start.collator,
        config=config,
        prompt=start.prompt,
        validation_names=[part.name for part in parts["validation"]],
    )


def _facts(config: TrainConfig, trainer: QScorerTrainer, data: Data, metrics: dict[str, float]) -> dict[str, Any]:
    """Content of `training.json`."""
    return {
        "configuration": json.loads(config.model_dump_json()),
        "data": {role: scale_facts(parts) for role, parts in data.items()},
        "metrics": metrics,
        "best_state": trainer.state.best_model_checkpoint and Path(trainer.state.best_model_checkpoint).name,
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "device": trainer.args.device.type,
        "versions": {
            "python": platform.python_version(),
            "pyiqa-qscorer": __version__,
            **{name: version(name) for name in _DECIDING_PACKAGES},
        },
        "curves": trainer.state.log_history,
    }
