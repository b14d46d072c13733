"""Training loop: transformers' `Trainer` with the Q-Scorer objective, evaluation by correlation, and exact resume."""

from __future__ import annotations

import json
import logging
import math
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EvalPrediction, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_pt_utils import safe_globals

from ..errors import CheckpointError, TrainingFailedError
from ..evaluation.correlation import correlations
from ..model import QScorerForScoring
from ..model.network import QualityConfig
from ..model.vlm import VlmQScorer
from .average import WeightAverage, save_values, set_parameters, trained_parameters
from .batches import MixedSampler
from .cached_statistics import CachedStatistics
from .callbacks import EpochsAndStates, ShowParts, StopOnSignal
from .config import TrainConfig
from .dataset import LabelledImages, QualityDataset
from .objectives import total_objective

logger = logging.getLogger("pyiqa_qscorer")
OPINIONS = ("mos", "mos_std", "dataset")  # of a batch; the rest is for the network
TRAINED_WEIGHTS = "trained.safetensors"
REMEDY = "lower training.learning_rate, or set training.fp16: false (bf16: true, or float32), with a new output folder"
STATE_FILE = "trainer_state.json"  # transformers writes it last, so a folder with a whole one is complete


class QScorerTrainer(Trainer):
    """`Trainer` for a `ScoringNetwork`.

    Only trained parameters go into the resumable states; the frozen base is read again from where it came from.

    Args:
        config: its objective, and those of its training settings that transformers does not know.
        prompt: prompt that the evaluation scores with, of the network's kind.
        validation_names: of the datasets of `eval_dataset`.
    """

    model: QScorerForScoring | VlmQScorer

    def __init__(
        self, *, config: TrainConfig, prompt: Any, validation_names: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(compute_metrics=partial(evaluation_metrics, validation_names), **kwargs)
        self.config, self.prompt = config, prompt
        self._parts: dict[str, list[Tensor]] = {}
        self._scores: list[tuple[Tensor, Tensor]] = []
        dataset = self.train_dataset
        assert isinstance(dataset, (QualityDataset, CachedStatistics))
        parts: list[LabelledImages] = dataset.parts
        self.sampler = MixedSampler(parts, self.args.seed)
        decay = config.training.average_decay
        self.average = None if decay is None else WeightAverage(self.model, decay)
        if self.average is not None:
            self.add_callback(self.average)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        for callback in (ShowParts(), EpochsAndStates(self.sampler, config.training.save_steps), StopOnSignal()):
            self.add_callback(callback)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As transformers makes it, with the feature network in groups of their own if its learning rate is another."""
        optimizer = super().create_optimizer(model)
        rate = self.config.training.vision_backbone_learning_rate
        if rate is not None:
            backbone = set(map(id, self.model.get_submodule("model.vision_model.backbone").parameters()))
            for group in list(optimizer.param_groups):
                slow = [parameter for parameter in group["params"] if id(parameter) in backbone]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in backbone]
                if slow:
                    optimizer.add_param_group({**group, "params": slow, "lr": rate})
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Total objective of a batch; keeps its parts and scores for the log."""
        mos = inputs["mos"]
        output = model(**_of_the_network(inputs))
        settings, network = self.config.objective, cast(QualityConfig, self.model.config)
        total, parts = total_objective(
            settings.weights(network.formulation),
            network,
            output,
            (mos, inputs["mos_std"], inputs["dataset"]),
            settings.ranking_margin,
            (0.0, 5.0) if settings.clamp_score else None,
        )
        total = settings.scale * total
        for name, part in parts.items():
            self._parts.setdefault(name, []).append(part)
        self._scores.append((output.raw_scores.detach().float(), mos[output.quality_rows]))
        return (total, output) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean of each part, and the correlation over the images, since the last log."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise TrainingFailedError(f"the loss is {logs['loss']} at step {self.state.global_step}: {REMEDY}")
        if "loss" in logs and self._parts:
            logs.update({name: torch.stack(parts).float().mean().item() for name, parts in self._parts.items()})
            scores, mos = (torch.cat(kind).cpu().numpy() for kind in zip(*self._scores, strict=True))
            logs["train_srcc"] = agreement(scores, mos)["srcc"]
            self._parts, self._scores = {}, []
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Of the averaged weights, where there are any."""
        with nullcontext() if self.average is None else self.average.applied():
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Scores (B,) by the scoring procedure itself, not by teacher forcing, and labels (B, 2): MOS, dataset."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            output = self.model.score_collated(_of_the_network(inputs), self.prompt)
        return None, output.raw_score.float(), torch.stack([inputs["mos"], inputs["dataset"].float()], dim=1)

    def _get_train_sampler(self, train_dataset: Any = None) -> MixedSampler:
        return self.sampler

    # --- resumable states -------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        values = self.model.state_dict() if state_dict is None else state_dict
        trained = {name: values[name] for name in trained_parameters(self.model)}
        if odd := sorted(name for name, value in trained.items() if not value.isfinite().all()):
            raise TrainingFailedError(
                f"the weights are not finite any more at step {self.state.global_step} (e.g. {odd[0]}), so no state "
                f"was written: {REMEDY}"
            )
        save_values(trained, folder / TRAINED_WEIGHTS)
        if self.average is not None:
            self.average.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trained = load_file(Path(resume_from_checkpoint) / TRAINED_WEIGHTS)
        parameters = trained_parameters(self.model)
        odd = sorted(trained.keys() ^ parameters.keys()) or sorted(
            name for name, parameter in parameters.items() if parameter.shape != trained[name].shape
        )
        if odd:
            raise CheckpointError(
                f"{resume_from_checkpoint} was written with other trained parameters: {', '.join(odd[:5])}; "
                "resume with the configuration of that run, or use another output folder"
            )
        set_parameters(parameters, trained)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        step = self.state.best_global_step
        if step:
            state = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
            refuse_lost_state(state, self.state.best_metric)
            self._load_from_checkpoint(str(state))


def _of_the_network(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in OPINIONS}


def agreement(scores: np.ndarray, mos: np.ndarray) -> dict[str, float]:
    """SRCC, PLCC, KRCC and RMSE of (N,) scores against MOS; a correlation that is not defined counts as 0.

    Raises:
        TrainingFailedError: a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise TrainingFailedError(
            f"{np.count_nonzero(~np.isfinite(scores))} of {len(scores)} scores are not finite: {REMEDY}"
        )
    found = correlations(scores, mos, fit=False)
    return {name: getattr(found, name) or 0.0 for name in ("srcc", "plcc", "krcc", "rmse")}


def evaluation_metrics(names: Sequence[str], prediction: EvalPrediction) -> dict[str, float]:
    """`agreement` in the form that `Trainer` asks for, its first argument bound.

    Opinions of different datasets are on scales that do not compare, so each dataset counts by itself: the mean over
    them, and beside it, with several, each one's SRCC.

    Args:
        names: of the datasets; the second column of the labels counts them.
    """
    scores, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    found = [agreement(scores[labels[:, 1] == part], labels[labels[:, 1] == part, 0]) for part in range(len(names))]
    mean = {measure: float(np.mean([one[measure] for one in found])) for measure in found[0]}
    if len(names) == 1:
        return mean
    return mean | {f"srcc_{number}_{names[number]}": one["srcc"] for number, one in enumerate(found)}


def last_complete_state(output: Path, readable: bool = True) -> Path | None:
    """Newest resumable state of a run that was written to its end; a killed process leaves torn ones behind.

    Args:
        readable: of those, the newest without a damaged file.

    Raises:
        TrainingFailedError: all of them are damaged.
    """
    complete = [state for state in states_of(output)[::-1] if _is_complete(state)]
    for state in complete:
        if not readable or damaged_file(state) is None:
            return state
    if complete:
        raise TrainingFailedError(
            f"no state in {output} is whole: {damaged_file(complete[0])} of {complete[0].name} cannot be read. Put a "
            "state back from a copy, or train again in a new output folder"
        )
    return None


def set_damaged_aside(output: Path) -> None:
    """Rename complete states that are newer than the newest whole one, so that they do not outlast whole ones."""
    whole = last_complete_state(output)
    for state in states_of(output)[::-1]:
        if state == whole:
            return
        if _is_complete(state):
            aside = state.with_name(f"damaged-{state.name}")
            logger.warning(
                f"{damaged_file(state)} of the state {state} cannot be read: it becomes {aside.name}, and the training "
                f"goes on from {whole and whole.name}"
            )
            shutil.rmtree(aside, ignore_errors=True)
            state.rename(aside)


def damaged_file(state: Path, kinds: Sequence[str] = ("safetensors", "pt", "pth")) -> str | None:
    """Name of a file of a complete state that is not there or not as it was written, None if all are whole."""
    names = {TRAINED_WEIGHTS, "optimizer.pt", "scheduler.pt", *(file.name for file in state.glob("*"))}
    if not any(name.startswith("rng_state_") for name in names):  # of several processes
        names.add("rng_state.pth")
    for name in sorted(name for name in names if name.rpartition(".")[2] in kinds):
        try:
            if name.endswith(".safetensors"):
                with safe_open(state / name, "pt"):  # compares sizes
                    continue
            with safe_globals(), zipfile.ZipFile(state / name) as archive:
                torch.load(state / name, "cpu", weights_only=True, mmap=True)
                if archive.testzip() is not None:
                    return name
        except Exception:  # a damaged pickle may raise anything
            return name
    return None


def states_of(output: Path) -> list[Path]:
    """Resumable states of a run, whole or torn, the oldest first."""
    numbered = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))


def refuse_lost_best(state: Path) -> None:
    """Raise `TrainingFailedError` where the best state that a state to resume from remembers is gone."""
    facts = json.loads((state / STATE_FILE).read_text())
    if step := facts.get("best_global_step"):
        refuse_lost_state(state.with_name(f"checkpoint-{step}"), facts.get("best_metric"))


def refuse_lost_state(state: Path, metric: float | None) -> None:
    """Raise `TrainingFailedError` where a best state is not there any more."""
    if not _is_complete(state) or damaged_file(state, ["safetensors"]):
        raise TrainingFailedError(
            f"the best state of this run, {state} (validation {metric}), is gone or torn, so its weights are lost. Put "
            "it back from a copy, train again in a new output folder, or set training.load_best_model_at_end: false to "
            "go on and keep the last weights instead"
        )


def _is_complete(state: Path) -> bool:
    try:
        json.loads((state / STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return True
