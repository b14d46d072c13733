"""Facts about this machine: memory, GPUs, and what lies in the Hub cache."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..registry import PUBLISHED_BASE, PUBLISHED_CHECKPOINT


@dataclass(frozen=True)
class Device:
    """A CUDA or Apple GPU. Memory in bytes, None where it is not known."""

    name: str
    description: str
    memory: int | None
    free_memory: int | None


@dataclass(frozen=True)
class Machine:
    """Memory in bytes, None where it is not known; it respects a container's limit."""

    system: str
    cpu_cores: int
    memory: int | None
    free_memory: int | None
    devices: tuple[Device, ...]


@dataclass(frozen=True)
class Cache:
    """The Hub cache: its folder, the free disk there, and the repositories of the published model.

    Attributes:
        folder: Where downloads go.
        free: Bytes.
        complete: By repository, whether all it needs is there.
        stored: By repository, bytes that are there, also of an interrupted download.
        offline: Why nothing may be downloaded, None if it may.
    """

    folder: str
    free: int
    complete: dict[str, bool]
    stored: dict[str, int]
    offline: str | None


def examine_machine(has_torch: bool) -> Machine:
    """Look at this machine; at its GPUs only where torch can be imported."""
    memory, free = _memory()
    devices = tuple(_devices()) if has_torch else ()
    return Machine(platform.platform(terse=True), os.cpu_count() or 1, memory, free, devices)


def _memory() -> tuple[int | None, int | None]:
    """Total and available bytes of RAM."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        kilobytes = (int(lines[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
        memory, free = (value * 1024 for value in kilobytes)
        limit = _container_limit()
        return (memory, free) if limit is None else (min(memory, limit), min(free, limit))
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    return None, None


def _container_limit() -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup", name)
        if file.exists() and (text := file.read_text().strip()).isdigit():
            return int(text)
    return None


def _devices() -> list[Device]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free = None
        with suppress(RuntimeError):  # e.g. in exclusive use: its size is known all the same
            free = torch.cuda.mem_get_info(index)[0]
        properties = torch.cuda.get_device_properties(index)
        devices.append(Device(f"cuda:{index}", properties.name, properties.total_memory, free))
    if torch.backends.mps.is_available():
        devices.append(Device("mps", "Apple GPU", None, None))
    return devices


def examine_cache(cache_dir: str | None) -> Cache:
    """Look at the cache in `cache_dir`, else the Hub's own; asks no server."""
    from huggingface_hub import constants

    from ..checkpoints import hub
    from ..errors import CheckpointError, DownloadError
    from ..files import free_bytes

    folder = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
    complete, stored = {}, {}
    for repo_id in (PUBLISHED_BASE, PUBLISHED_CHECKPOINT):
        try:
            plan = hub.plan(repo_id, cache_dir=folder, local_files_only=True)
            complete[repo_id] = not plan.missing
        except (CheckpointError, DownloadError):
            complete[repo_id] = False
        blobs = folder / f"models--{repo_id.replace('/', '--')}" / "blobs"
        stored[repo_id] = sum(file.stat().st_size for file in blobs.glob("*") if file.is_file())
    offline = "HF_HUB_OFFLINE=1 is set" if constants.HF_HUB_OFFLINE else None
    return Cache(str(folder), free_bytes(folder), complete, stored, offline)
