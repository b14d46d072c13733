"""Folder of a run: who may write it, which configuration it belongs to, where it goes on, and what it ends with."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..checkpoints import save_folder, save_lora_folder
from ..checkpoints.new_folder import check_output as check_folder
from ..checkpoints.new_folder import disk_is_full
from ..checkpoints.vlm_checkpoint import save_vlm_folder
from ..errors import TrainingFailedError
from ..files import read_json, write_text
from ..model import QScorerForScoring
from ..model.vlm import VlmQScorer
from .config import TrainConfig
from .model_card import model_card
from .starting_model import Start, from_checkpoint
from .trainer import last_complete_state, refuse_lost_best, set_damaged_aside

CONFIGURATION_FILE = "configuration.json"
LOCK_FILE = ".lock"
SECONDS_TO_END = 5  # for a killed process to give back its memory
FREE_SETTINGS = {
    *("output", "layouts", "data.statistics"),
    *(f"training.{name}" for name in ("dataloader_num_workers", "use_cpu", "report_to", "load_best_model_at_end")),
    *(f"training.{name}" for name in ("logging_steps", "save_steps", "save_total_limit")),
    # These go with the number of processes and their memory.
    *("training.per_device_train_batch_size", "training.gradient_accumulation_steps", "model.gradient_checkpointing"),
}
"""Settings that may differ when a run goes on: where it lies, and how it is computed."""


def state_to_resume(config: TrainConfig, resume: bool) -> Path | None:
    """The state that a run goes on from, if there is one. Changes nothing on disk.

    Raises:
        TrainingFailedError: the folder cannot be written, or holds a run of another configuration, one that is not to
            be resumed, or one whose best state is gone or whose states are all damaged.
    """
    output = config.output
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise TrainingFailedError(f"output {output} cannot be made in {there}; choose another folder")
    finished = len(written_checkpoints(config)) == len(config.layouts)
    state, file = last_complete_state(output, readable=not finished), output / CONFIGURATION_FILE
    if state is None:
        return None
    if not resume:
        raise TrainingFailedError(f"output {output} holds the run {state.name}: resume it, or use a new folder")
    if file.exists():
        before, now = map(_deciding_settings, (read_json(file), config.model_dump(mode="json")))
        if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
            shown = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed[:5])
            raise TrainingFailedError(
                f"output {output} holds a run of another configuration: {shown}. Set it back, or use a new folder"
            )
    if config.training.load_best_model_at_end and config.data.validation and not finished:
        refuse_lost_best(state)
    return state


@contextmanager
def opened_output(config: TrainConfig) -> Iterator[None]:
    """Inside, the folder is there, is this run's alone, the newest state is whole, and failures say what to change.

    Raises:
        TrainingFailedError: another process trains into the folder; or, from inside, memory or disk ran out, or a
            process that reads images was killed.
    """
    output = config.output
    lock = FileLock(output / LOCK_FILE)
    try:
        output.mkdir(parents=True, exist_ok=True)
        if int(os.environ.get("RANK", 0)) == 0:  # of several processes of one run, the first holds it
            lock.acquire(timeout=0)
            set_damaged_aside(output)
            write_text(output / CONFIGURATION_FILE, json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
        # Twice: a worker's death breaks a connection, and torch's signal handler raises besides, at any moment, so also
        # while the inner one looks at the broken connection.
        with _killed_worker_named(output), _killed_worker_named(output):
            yield
    except Timeout as error:
        raise TrainingFailedError(
            f"another process trains into {output}: wait for its end, or use another output folder"
        ) from error
    except torch.OutOfMemoryError as error:
        raise TrainingFailedError(
            f"not enough memory ({error}); lower training.per_device_train_batch_size and raise "
            "training.gradient_accumulation_steps, turn on model.gradient_checkpointing, train fewer parts "
            "(trainable.*), or set lora.quantise_base: 4bit"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if not disk_is_full(error):
            raise
        raise _to_be_repeated(f"the disk of {output} is full", error, "make room", output) from error
    finally:
        lock.release()


@contextmanager
def _killed_worker_named(output: Path) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, EOFError, RuntimeError) as error:
        if not _worker_died(error):
            raise
        if isinstance(error, (ConnectionError, EOFError)):
            with suppress(RuntimeError):  # of torch's handler, once the process has ended: here, not in what follows
                time.sleep(SECONDS_TO_END)
        remedy = "where the system did it for want of memory, lower training.dataloader_num_workers (0: none)"
        raise _to_be_repeated("a process that reads images was killed", error, remedy, output) from error


def _worker_died(error: Exception) -> bool:
    """As torch's signal handler says, anywhere, or as a connection that broke in its loader."""
    if str(error).startswith("DataLoader worker (pid"):
        return True
    loader = torch.utils.data.dataloader.__file__
    frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, (ConnectionError, EOFError)) and loader in frames


def _to_be_repeated(reason: str, error: Exception, remedy: str, output: Path) -> TrainingFailedError:
    # Not read through: that takes long, and would take torch's signal for damage.
    state = last_complete_state(output, readable=False)
    return TrainingFailedError(
        f"{reason} ({' '.join(str(error).split())}); {remedy}, and run the same command again: it goes on from "
        f"{state.name if state else 'the start'}"
    )


def _deciding_settings(content: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Dotted keys and values of what must not change within a run."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _deciding_settings(value, f"{place}{key}.")
        elif place + key not in FREE_SETTINGS:
            flat[place + key] = value
    return flat


# --- checkpoints ----------------------------------------------------------------------------------------------------


def write_checkpoints(config: TrainConfig, start: Start, facts: dict[str, Any]) -> dict[str, Path]:
    """Write the asked-for layouts, each with `training.json` and a model card; those that are there already stay."""
    model = start.model
    model.config.training_data = facts["data"]
    folders = written_checkpoints(config)
    merged: QScorerForScoring | None = None
    for layout in [layout for layout in config.layouts if layout not in folders]:
        target = _target(config.output, layout)
        kind = "adapter of peft, score tokens, regressor" if isinstance(model, VlmQScorer) else layout
        notes = {"training.json": json.dumps(facts, indent=2) + "\n", "README.md": model_card(facts, kind)}
        if isinstance(model, VlmQScorer):
            folders[layout] = save_vlm_folder(target, model, start.adapters, notes)
        elif layout == "published_lora":
            folders[layout] = save_lora_folder(target, model, start.adapters, notes)
        else:
            merged = merged or _merged(config, model)
            source = _tokenizer_folder(start.tokenizer)
            folders[layout] = save_folder(
                target, merged, start.tokenizer, layout=layout, tokenizer_source=source, notes=notes
            )
    return folders


def check_targets(config: TrainConfig, start: Start) -> None:
    """Raise what `write_checkpoints` would, before the training that it would lose.

    Raises:
        CheckpointError: a layout that this network cannot have, a folder in the way, or no `tokenizer.model`.
    """
    written, model = written_checkpoints(config), start.model
    for layout in config.layouts:
        published = layout == "published"
        if layout != "qscorer" and isinstance(model, QScorerForScoring) and model.config.vision_config.kind != "vit":
            model.config.to_published()
        if layout not in written:
            source = _tokenizer_folder(start.tokenizer) if published else None
            check_folder(_target(config.output, layout), "published" if published else "qscorer", source)


def written_checkpoints(config: TrainConfig) -> dict[str, Path]:
    """Folder by layout of what an earlier call wrote; a folder is there only when it is complete."""
    targets = {layout: _target(config.output, layout) for layout in config.layouts}
    return {layout: folder for layout, folder in targets.items() if (folder / "training.json").exists()}


def _merged(config: TrainConfig, trained: QScorerForScoring) -> QScorerForScoring:
    """The trained model without adapters, in float16, or float32 where it was trained so.

    Where adapters were trained, frozen weights are read from the starting checkpoint again: training may have held
    them in bfloat16 or quantised, and what was not trained must come out as it went in.
    """
    dtype = torch.float32 if config.training.precision == "float32" else torch.float16
    if config.model.architecture is not None or config.trainable.everything:
        return nn.Module.to(trained, dtype)
    from peft.tuners.tuners_utils import BaseTunerLayer

    model, _ = from_checkpoint(config, dtype)
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
