"""Folder of a run: which configuration it belongs to, where it goes on, and what to do when memory or disk run out."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import TrainingFailedError
from ..files import write_text
from .config import TrainConfig
from .trainer import last_complete_state

CONFIGURATION_FILE = "configuration.json"
FREE_SETTINGS = {
    *("output", "layouts", "device", "data.photos", "data.rendered", "data.workers", "data.render_workers"),
    *("optimisation.log_steps", "optimisation.save_steps", "optimisation.keep"),
    # These go with the number of processes and their memory.
    *("optimisation.batch_size", "optimisation.gradient_accumulation", "model.gradient_checkpointing"),
}
"""Settings that may differ when a run goes on: where it lies, and how it is computed."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_output(config: TrainConfig, resume: bool) -> Path | None:
    """The state to go on from, if there is one; the output folder gets the configuration that it is a run of."""
    output, file = config.output, config.output / CONFIGURATION_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingFailedError(f"output {output} cannot be made ({error}); choose another folder") from error
    state = last_complete_state(output)
    if state is not None and not resume:
        raise TrainingFailedError(f"output {output} holds the run {state.name}: resume it, or use a new folder")
    content = config.model_dump(mode="json")
    if state is not None and file.exists():
        before, now = (_deciding_settings(settings) for settings in (json.loads(file.read_text()), content))
        if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
            shown = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed[:5])
            raise TrainingFailedError(
                f"output {output} holds a run of another configuration: {shown}. Set it back, or use a new folder"
            )
    write_text(file, json.dumps(content, indent=2) + "\n")
    return state


def _deciding_settings(content: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys and values of what must not change within a run."""
    flat: dict[str, Any] = {}
    pending = [("", content)]
    while pending:
        place, section = pending.pop()
        for key, value in section.items():
            if isinstance(value, dict):
                pending.append((f"{place}{key}.", value))
            else:
                flat[place + key] = value
    return {key: value for key, value in flat.items() if key not in FREE_SETTINGS}


@contextmanager
def explained_failures(output: Path) -> Iterator[None]:
    """What to change where memory or disk run out."""
    try:
        yield
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


def _disk_is_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    return any(f"os error {number}" in str(error) for number in FULL_DISK)  # safetensors keeps it in the text only
