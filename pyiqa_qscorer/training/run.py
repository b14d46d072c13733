"""One training run from a configuration: model, adapters, data, loop, and the checkpoints it leaves."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm
from transformers import TrainingArguments, set_seed

from .. import __version__
from ..checkpoints.start import StartingPoint
from ..data.opinions import NamedDatasets
from ..model.attention import enable_gradient_checkpointing
from ..synthetic.distortions import codec_versions
from ..synthetic.render import CALIBRATION_FILE, CompareToReference, Recipe, find_photos, render
from .batches import Collator
from .cached_statistics import CachedStatistics, fit_standardisation
from .config import DatasetConfig, TrainConfig
from .dataset import LabelledImages, QualityDataset, read_dataset, refuse_common_files, refuse_overlap, scale_facts
from .output_checkpoints import check_targets, write_checkpoints, written_checkpoints
from .output_folder import explained_failures, open_output
from .starting_model import choose_trained, starting_point
from .text import TrainingText, training_text
from .trainer import QScorerTrainer, evaluation_metrics

if TYPE_CHECKING:
    from peft import PeftModel

    from ..model.features import FeatureEncoder

_DECIDING_PACKAGES = ("torch", "transformers", "peft", "pyiqa", "timm", "pillow", "numpy", "scipy")
logger = logging.getLogger("pyiqa_qscorer")


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
        named_datasets: opens datasets given by name; `host.pyiqa_datasets.pyiqa_dataset` for those of pyiqa.
        compare: full-reference metrics for the labels of synthetic chains;
            `pyiqa_qscorer.host.reference_metrics.ReferenceMetrics(REFERENCE_METRICS)`.

    Raises:
        SyntheticDataError, TrainingDataError, CheckpointError, DownloadError: what the configuration names cannot be
            used.
        TrainingFailedError: the folder holds a run of another configuration; no memory, no disk, or a loss that is not
            finite. The last complete state stays.
    """
    state = open_output(config, resume)
    written = written_checkpoints(config)
    if state is not None and len(written) == len(config.layouts):  # nothing is left to do
        history = json.loads((next(iter(written.values())) / "training.json").read_text())
        return TrainingResult(written, history["metrics"], True)
    # What can be wrong with tables and model comes before hours of rendering.
    read = _Reader(config, named_datasets)
    _check_photos(config)
    set_seed(config.optimisation.seed)
    start = starting_point(config)
    texts = _texts(config, start)
    adapters = choose_trained(start.model, config)
    check_targets(config, start)
    with explained_failures(config.output):
        train_parts, validation_parts = read.with_rendered(compare)
        return _run(config, start, adapters, texts, state, train_parts, validation_parts)


def _run(
    config: TrainConfig,
    start: StartingPoint,
    adapters: PeftModel | None,
    texts: list[TrainingText],
    state: Path | None,
    train_parts: list[LabelledImages],
    validation_parts: list[LabelledImages],
) -> TrainingResult:
    trainer = _trainer(config, start, texts, train_parts, validation_parts)
    trainer.train(resume_from_checkpoint=None if state is None else str(state))
    if trainer.state.global_step < trainer.state.max_steps:
        return TrainingResult({}, {}, False)
    if trainer.average is not None:
        trainer.average.apply()
    metrics = trainer.evaluate(metric_key_prefix="validation") if validation_parts else {}
    folders: dict[str, Path] = {}
    if trainer.is_world_process_zero():
        facts = _facts(config, trainer, train_parts, validation_parts, metrics)
        folders = write_checkpoints(config, start, adapters, facts)
    return TrainingResult(folders, metrics, True)


class _Reader:
    """The datasets of a run: those on disk are read at once, synthetic ones when they have been rendered."""

    def __init__(self, config: TrainConfig, named_datasets: NamedDatasets | None) -> None:
        self.config, self.named_datasets = config, named_datasets
        self.parts = {
            "train": [self._read(part, "train") for part in config.data.train],
            "val": [self._read(part, "val") for part in config.data.validation],
        }
        self._refuse_overlap()

    def _read(self, part: DatasetConfig, phase: str) -> LabelledImages | None:
        if part.synthetic is not None:
            return None
        config = self.config
        needs_std = phase == "train" and config.objective.needs_std(config.model.formulation)
        read = read_dataset(part, phase, config.data.on_error, needs_std, self.named_datasets)
        for path, reason in read.skipped:
            logger.warning("dataset %s: left out %s: %s", read.name, path, reason)
        return read

    def _refuse_overlap(self) -> None:
        if not self.config.data.allow_overlap:
            refuse_overlap(*([part for part in parts if part is not None] for parts in self.parts.values()))

    def with_rendered(self, compare: CompareToReference | None) -> tuple[list[LabelledImages], list[LabelledImages]]:
        """Training and validation data, the synthetic ones rendered, or what is missing of them."""
        found: list[list[LabelledImages]] = []
        for name, phase, configs in (
            ("train", "train", self.config.data.train),
            ("validation", "val", self.config.data.validation),
        ):
            parts = []
            for number, (config, part) in enumerate(zip(configs, self.parts[phase], strict=True)):
                read = part or self._read(_rendered(self.config, config, f"{name}{number}", compare), phase)
                assert read is not None  # a rendered dataset is not synthetic any more
                parts.append(read)
            found.append(parts)
        return found[0], found[1]


def _rendered(config: TrainConfig, part: DatasetConfig, name: str, compare: CompareToReference | None) -> DatasetConfig:
    """A synthetic dataset as the folder and table that it became."""
    assert part.synthetic is not None
    root = _rendered_folder(config)
    folder = root / f"{name}_{part.synthetic}"
    with tqdm(total=part.count, desc=f"rendering {folder.name}", unit="picture") as bar:
        table = render(
            Recipe(part.synthetic, part.count, part.type_shares, seed=part.seed),
            *(_photos(config, part), folder, compare, root / CALIBRATION_FILE),
            workers=config.data.render_workers,
            progress=lambda done, total: bar.update(done - bar.n),
        )
    return DatasetConfig(
        name=part.name or f"{part.synthetic} of {', '.join(path.name for path in part.photos)}",
        folder=folder / "images",
        csv=table,
        std_column="std",
        mos_range=(1, 5),
        weight=part.weight,
    )


def _check_photos(config: TrainConfig) -> None:
    """Refuse folders without photos, and photos that are both trained and validated on."""
    trained, validated = (
        [path for part in parts for path in _photos(config, part)]
        for parts in (config.data.train, config.data.validation)
    )
    if not config.data.allow_overlap:
        refuse_common_files(trained, validated, "give the synthetic datasets other photos")


def _photos(config: TrainConfig, part: DatasetConfig) -> list[Path]:
    return find_photos([config.data.photos / folder for folder in part.photos]) if part.photos else []


def _rendered_folder(config: TrainConfig) -> Path:
    return config.data.rendered or config.output / "rendered"


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
    if network.vision_config.kind == "features":
        encoder = cast("FeatureEncoder", start.model.model.vision_model).to(arguments.device)
        if config.data.cache_statistics:
            folder = _rendered_folder(config) / "statistics"
            data, validation = (
                None if images is None else CachedStatistics(images, encoder, folder, max(1, config.data.workers))
                for images in (data, validation)
            )
        if config.model.architecture is not None:
            fit_standardisation(encoder, data)
    if config.model.gradient_checkpointing:
        enable_gradient_checkpointing(start.model)
    return QScorerTrainer(
        save_steps=settings.save_steps,
        vision_backbone_rate=settings.vision_backbone_learning_rate,
        average_decay=settings.average_decay,
        model=start.model,
        args=arguments,
        train_dataset=data,
        eval_dataset=validation,
        data_collator=Collator(texts, network.quality_token_ids),
        compute_metrics=partial(evaluation_metrics, [part.name for part in validation_parts]),
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
            **{name: version(name) for name in _DECIDING_PACKAGES},
            **(codec_versions() if config.data.synthetic else {}),
        },
        "curves": trainer.state.log_history,
    }
