"""Facts about this installation and machine, and whether each metric can run here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from pyiqa_qscorer.names import METRICS, PUBLISHED_BASE, PUBLISHED_CHECKPOINT
from pyiqa_qscorer.plugin import RegistrationState, registration_state

DISTRIBUTION = "pyiqa-qscorer"
SHOWN_PACKAGES = (
    DISTRIBUTION,
    "pyiqa",
    "torch",
    "transformers",
    "peft",
    "huggingface_hub",
    "pillow",
    "bitsandbytes",
    "flash_attn",
)

# Parameters of the published model that bitsandbytes quantises (linear layers of the decoder), and
# those that it leaves.
QUANTISED_PARAMETERS = 7_549_747_200
OTHER_PARAMETERS = 658_642_945
# About: the Hub is not asked.
DOWNLOAD_BYTES = {PUBLISHED_BASE: 16.6e9, PUBLISHED_CHECKPOINT: 1.6e9}
BYTES_PER_QUANTISED_PARAMETER = {"8bit": 1.0, "4bit": 0.5625}  # 4 bit and one float32 per 64
# Beside the weights: activations of a batch of 16, and the CUDA context.
WORKING_MEMORY = 2e9

LLAMA_MODULE = "transformers.models.llama.modeling_llama"


@dataclass(frozen=True)
class Device:
    """A CUDA or Apple GPU. Memory in bytes, None where it is not known."""

    name: str
    description: str
    memory: int | None
    free_memory: int | None


@dataclass(frozen=True)
class Verdict:
    """Whether a metric can run here: `state` is "ready", "after download" or "cannot run"."""

    metric: str
    description: str
    state: str
    reason: str


@dataclass(frozen=True)
class Llama:
    """What became of transformers' Llama classes, which some of pyiqa's metrics replace.

    Attributes:
        loaded: Whether this process has imported them.
        replaced: Which of them are not transformers' own in this process.
        pyiqa_replaces: Which of them the installed pyiqa has code to replace.
        pyiqa_files: Where that code lies.
    """

    loaded: bool
    replaced: tuple[str, ...]
    pyiqa_replaces: tuple[str, ...]
    pyiqa_files: tuple[str, ...]


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


@dataclass(frozen=True)
class Report:
    """All facts.

    `problems`: what is wrong with the installation, with what to do. Where the package cannot even
    be imported, `cache` is None and there are no verdicts.
    """

    python: str
    packages: dict[str, str | None]
    registration: RegistrationState
    llama: Llama
    machine: Machine
    cache: Cache | None
    verdicts: tuple[Verdict, ...]
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(cache_dir: str | None = None) -> Report:
    """Look at everything; changes nothing, asks no server, and does not import pyiqa."""
    failure = _import_failure()
    machine = _machine(failure is None)
    cache = _cache(cache_dir) if failure is None else None
    registration = registration_state()
    problems = [*_unmet_requirements(), *registration_problems(registration)]
    if failure is not None:
        problems.append(f"the package cannot be imported: {failure}")
    return Report(
        python=f"{platform.python_version()} ({sys.executable})",
        packages={name: _version(name) for name in SHOWN_PACKAGES},
        registration=registration,
        llama=Llama(
            LLAMA_MODULE in sys.modules,
            replaced_llama_parts(sys.modules.get(LLAMA_MODULE)),
            *_replacing_code_of_pyiqa(),
        ),
        machine=machine,
        cache=cache,
        verdicts=tuple(judge(name, machine, cache) for name in METRICS) if cache else (),
        problems=tuple(problems),
    )


# --- installation -------------------------------------------------------------------------------


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_failure() -> str | None:
    try:
        import_module("pyiqa_qscorer.metric")
    except Exception as error:  # a broken dependency may raise anything; reported as a problem
        return f"{type(error).__name__}: {error}"
    return None


def _unmet_requirements() -> list[str]:
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [f"{DISTRIBUTION} is not installed (run from a source folder?): pip install -e ."]
    problems = []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None:
            problems.append(f"{requirement} is not installed: pip install '{requirement}'")
        elif not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement} is needed, found {found}: pip install -U '{requirement}'")
    return problems


def registration_problems(state: RegistrationState) -> list[str]:
    """Why `import pyiqa` alone would not know our metrics."""
    if state.problem is not None:
        return [f"the metrics could not be added to pyiqa: {state.problem}"]
    if state.switched_off:
        return [
            "PYIQA_QSCORER_AUTOLOAD=0 keeps pyiqa from knowing the metrics: unset it, or call pyiqa_qscorer.register()"
        ]
    if not state.startup_file_ran:
        return [
            "Python's start-up files were not read (python -S, PYTHONPATH or pip --target): there "
            "pyiqa knows the metrics only after `import pyiqa_qscorer`"
        ]
    return []


def replaced_llama_parts(module: ModuleType | None) -> tuple[str, ...]:
    """Classes and forwards in transformers' Llama module (if loaded) that are not its own."""
    replaced = []
    for name in (
        "LlamaConfig",
        "LlamaAttention",
        "LlamaDecoderLayer",
        "LlamaModel",
        "LlamaForCausalLM",
    ):
        part = getattr(module, name, None)
        if part is None:
            continue
        if not part.__module__.startswith("transformers."):
            replaced.append(name)
        elif not getattr(part, "forward", part).__module__.startswith("transformers."):
            replaced.append(f"{name}.forward")
    return tuple(replaced)


def _replacing_code_of_pyiqa() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Assignments to transformers' Llama module in pyiqa's files, which are read, not imported."""
    spec = find_spec("pyiqa")
    parts: set[str] = set()
    files: set[str] = set()
    for location in spec.submodule_search_locations or () if spec else ():
        for file in sorted(Path(location, "archs").rglob("*.py")):
            text = file.read_text(encoding="utf-8", errors="replace")
            if found := re.findall(r"modeling_llama\.(Llama\w+(?:\.forward)?)\s*=", text):
                parts.update(found)
                files.add(file.relative_to(location).as_posix())
    return tuple(sorted(parts)), tuple(sorted(files))


# --- machine ------------------------------------------------------------------------------------


def _machine(has_torch: bool) -> Machine:
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


def _cache(cache_dir: str | None) -> Cache:
    from huggingface_hub import constants

    from pyiqa_qscorer.checkpoints import hub
    from pyiqa_qscorer.errors import CheckpointError, DownloadError

    folder = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
    complete, stored = {}, {}
    for repo_id in DOWNLOAD_BYTES:
        try:
            plan = hub.plan(repo_id, cache_dir=folder, local_files_only=True)
            complete[repo_id] = not plan.missing
        except (CheckpointError, DownloadError):
            complete[repo_id] = False
        blobs = folder / f"models--{repo_id.replace('/', '--')}" / "blobs"
        stored[repo_id] = sum(file.stat().st_size for file in blobs.glob("*") if file.is_file())
    offline = "HF_HUB_OFFLINE=1 is set" if constants.HF_HUB_OFFLINE else None
    return Cache(str(folder), hub.free_bytes(folder), complete, stored, offline)


# --- verdicts -----------------------------------------------------------------------------------


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
    if dtype in BYTES_PER_QUANTISED_PARAMETER:
        if find_spec("bitsandbytes") is None:
            return "cannot run", "needs bitsandbytes: pip install bitsandbytes"
        if not cuda:
            return "cannot run", "needs a CUDA GPU, and torch sees none"
    # Weights are read in 16 bit into host memory, whatever becomes of them then.
    host = weight_bytes("float16") + WORKING_MEMORY
    if machine.memory is not None and machine.memory < host:
        return "cannot run", f"needs {_gb(host)} of RAM to load; here are {_gb(machine.memory)}"
    needed = weight_bytes(dtype) + WORKING_MEMORY
    where = f"on the CPU in bfloat16, {_gb(host)} of RAM, tens of seconds per image"
    if cuda:
        largest = max(cuda, key=lambda device: device.memory or 0)
        if (largest.memory or 0) < needed:
            return "cannot run", (f"needs a GPU with {_gb(needed)}; {largest.name} has {_gb(largest.memory or 0)}")
        where = f"on {largest.name}, {_gb(needed)} of its {_gb(largest.memory or 0)}"
    if machine.free_memory is not None and machine.free_memory < host:
        where += f"; to load it needs {_gb(host)} of RAM, of which only {_gb(machine.free_memory)} is free now"
    missing = [repo_id for repo_id, complete in cache.complete.items() if not complete]
    if not missing:
        return "ready", where
    download = sum(max(DOWNLOAD_BYTES[name] - cache.stored[name], 0.0) for name in missing)
    if cache.offline:
        return "cannot run", f"its weights are not in the cache, and {cache.offline}"
    if download > cache.free:
        return "cannot run", (
            f"needs {_gb(download)} of disk for its weights; {cache.folder} has {_gb(cache.free)}: "
            "set HF_HOME to a bigger disk"
        )
    return "after download", f"about {_gb(download)}; then {where}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
