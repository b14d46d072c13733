"""Whether each metric can run on a machine, from its memory, GPUs and downloads."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..files import readable_size
from ..registry import METRICS, PUBLISHED_BASE, PUBLISHED_CHECKPOINT
from .machine_facts import Cache, Machine

# Parameters of the published model that bitsandbytes quantises (linear layers of the decoder), and
# those that it leaves.
QUANTISED_PARAMETERS = 7_549_747_200
OTHER_PARAMETERS = 658_642_945
# By the parameters in their files, since the Hub is not asked: the base in float16 without score tokens and regressor;
# of the checkpoint, adapters in float32, the other trained parts and the vocabulary in bfloat16.
DOWNLOAD_BYTES = {PUBLISHED_BASE: 16.4e9, PUBLISHED_CHECKPOINT: 1.6e9}
BYTES_PER_QUANTISED_PARAMETER = {"8bit": 1.0, "4bit": 0.5625}  # 4 bit and one float32 per 64
# Beside the weights: activations of a batch of 16, and the CUDA context.
WORKING_MEMORY = 2e9


@dataclass(frozen=True)
class Verdict:
    """Whether a metric can run here: `state` is "ready", "after download" or "cannot run"."""

    metric: str
    description: str
    state: str
    reason: str


def weight_bytes(dtype: str) -> float:
    """Memory of the published model's weights."""
    if dtype in BYTES_PER_QUANTISED_PARAMETER:
        quantised = QUANTISED_PARAMETERS * BYTES_PER_QUANTISED_PARAMETER[dtype]
        return quantised + 2 * OTHER_PARAMETERS
    return (4 if dtype == "float32" else 2) * (QUANTISED_PARAMETERS + OTHER_PARAMETERS)


def judge(metric: str, machine: Machine, cache: Cache) -> Verdict:
    """Whether `metric` can run with its own options on `machine`."""
    definition = METRICS[metric]
    state, reason = _judge(definition.options, machine, cache)
    return Verdict(metric, definition.description, state, reason)


def _judge(options: dict[str, Any], machine: Machine, cache: Cache) -> tuple[str, str]:
    dtype = options.get("dtype", "auto")
    if options.get("checkpoint") != PUBLISHED_CHECKPOINT:
        return "ready", "its weights are part of this package"
    cuda = [device for device in machine.devices if device.name.startswith("cuda")]
    quantised = dtype in BYTES_PER_QUANTISED_PARAMETER
    if quantised and find_spec("bitsandbytes") is None:
        return "cannot run", "needs bitsandbytes: pip install bitsandbytes"
    # Weights are read in 16 bit into host memory, whatever becomes of them then; quantised ones are made beside them.
    host = weight_bytes("float16") + WORKING_MEMORY + (weight_bytes(dtype) if quantised and not cuda else 0)
    if machine.memory is not None and machine.memory < host:
        return "cannot run", f"needs {readable_size(host)} of RAM to load; here are {readable_size(machine.memory)}"
    needed = weight_bytes(dtype) + WORKING_MEMORY
    if quantised:
        where = f"on the CPU, without gradients, {readable_size(host)} of RAM to load, then {readable_size(needed)}"
    else:
        where = f"on the CPU in bfloat16, {readable_size(host)} of RAM, tens of seconds per image"
    if cuda:
        largest = max(cuda, key=lambda device: device.memory or 0)
        if (largest.memory or 0) < needed:
            return "cannot run", (
                f"needs a GPU with {readable_size(needed)}; {largest.name} has {readable_size(largest.memory or 0)}"
            )
        where = f"on {largest.name}, {readable_size(needed)} of its {readable_size(largest.memory or 0)}"
    if machine.free_memory is not None and machine.free_memory < host:
        free = readable_size(machine.free_memory)
        where += f"; to load it needs {readable_size(host)} of RAM, of which only {free} is free now"
    missing = [repo_id for repo_id, complete in cache.complete.items() if not complete]
    if not missing:
        return "ready", where
    download = sum(max(DOWNLOAD_BYTES[name] - cache.stored[name], 0.0) for name in missing)
    if cache.offline:
        return "cannot run", f"its weights are not in the cache, and {cache.offline}"
    if download > cache.free:
        return "cannot run", (
            f"needs {readable_size(download)} of disk for its weights; {cache.folder} has {readable_size(cache.free)}: "
            "set HF_HOME to a bigger disk"
        )
    return "after download", f"about {readable_size(download)}; then {where}"
