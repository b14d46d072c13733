"""Command `pyiqa-qscorer doctor`: facts about this installation and machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import typer
from rich.table import Table
from rich.text import Text

from ..files import free_bytes, readable_size
from ..host.registration import RegistrationState, registration_state
from ..registry import METRICS, PUBLISHED_BASE, PUBLISHED_CHECKPOINT
from . import console as cli_output
from .console import clean_errors, count, writing_stdout
from .options import CacheDir, Debug, option

DISTRIBUTION = "pyiqa-qscorer"
SHOWN_PACKAGES = (
    *(DISTRIBUTION, "pyiqa", "torch", "transformers", "peft"),
    *("huggingface_hub", "pillow", "bitsandbytes", "flash_attn"),
)
SECONDS_FOR_THE_HUB = 5


def doctor(
    as_json: Annotated[bool, option("print the facts as JSON", "--json")] = False,
    cache_dir: CacheDir = None,
    debug: Debug = False,
) -> None:
    """Show versions, devices, memory, downloads, and what is wrong.

    Exit code 1 if something is wrong with the installation.
    """
    with clean_errors(debug):
        facts = examine(cache_dir)
        with writing_stdout():
            print(json.dumps(facts, indent=2)) if as_json else print_facts(facts)
    raise typer.Exit(1 if facts["problems"] else 0)


def examine(cache_dir: str | None = None) -> dict[str, Any]:
    """All facts, ready for JSON: sizes in bytes, None where something is not known.

    Changes nothing, does not import pyiqa, and asks the Hub only whether it answers. Where the package cannot be
    imported, there is nothing of devices, cache and Hub. `problems` says what is wrong, and what to do.
    """
    state = registration_state()
    failure = _import_failure()
    problems = [*unmet_requirements(), *registration_problems(state)]
    if failure is not None:
        problems.append(f"the package cannot be imported: {failure}")
    total, free = memory()
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "packages": {name: _version(name) for name in SHOWN_PACKAGES},
        "registration": asdict(state) | {"registered": state.registered},
        "metrics": {name: metric.description for name, metric in METRICS.items()},
        "system": platform.platform(terse=True),
        "cpu_cores": os.cpu_count() or 1,
        "memory": total,
        "free_memory": free,
        "devices": None if failure else devices(),
        "cache": None if failure else examine_cache(cache_dir),
        "hub": None if failure else hub_state(),
        "problems": problems,
    }


# --- the installation -------------------------------------------------------------------------------------------------


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


def unmet_requirements() -> list[str]:
    """Which of the package's requirements are not installed, or too old."""
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
    if state.pyiqa_imported and not state.registered:
        return [
            "pyiqa is imported but not extended: another import hook on sys.meta_path answered for it, or its tables "
            "were replaced. Call pyiqa_qscorer.register() after `import pyiqa`, or remove that hook"
        ]
    if not state.startup_file_ran:
        return [
            "Python's start-up files were not read (python -S, PYTHONPATH or pip --target): there "
            "pyiqa knows the metrics only after `import pyiqa_qscorer`"
        ]
    return []


# --- the machine ------------------------------------------------------------------------------------------------------


def memory(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Total and available bytes of RAM, no more than a container may take."""
    import psutil

    found = psutil.virtual_memory()
    limits = [found.total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = cgroup / name
        if file.exists() and (text := file.read_text().strip()).isdigit():  # else "max"
            limits.append(int(text))
    return min(limits), min(found.available, *limits)


def devices() -> list[dict[str, Any]]:
    """The GPUs that torch can use."""
    import torch

    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        facts = {"name": f"cuda:{index}", "description": gpu.name, "memory": gpu.total_memory, "free_memory": None}
        with suppress(RuntimeError):  # e.g. in exclusive use: its size is known all the same
            facts["free_memory"] = torch.cuda.mem_get_info(index)[0]
        found.append(facts)
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "description": "Apple GPU", "memory": None, "free_memory": None})
    return found


# --- downloads --------------------------------------------------------------------------------------------------------


def examine_cache(cache_dir: str | None) -> dict[str, Any]:
    """The cache in `cache_dir`, else the Hub's own: free disk, and what is there of the published model."""
    from huggingface_hub import constants

    from ..checkpoints import hub
    from ..errors import CheckpointError, DownloadError

    folder = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
    complete, stored = {}, {}
    for repo_id in (PUBLISHED_BASE, PUBLISHED_CHECKPOINT):
        try:
            complete[repo_id] = not hub.plan(repo_id, cache_dir=folder, local_files_only=True).missing
        except (CheckpointError, DownloadError):
            complete[repo_id] = False
        blobs = folder / f"models--{repo_id.replace('/', '--')}" / "blobs"
        stored[repo_id] = sum(file.stat().st_size for file in blobs.glob("*") if file.is_file())
    return {"folder": str(folder), "free": free_bytes(folder), "complete": complete, "stored": stored}


def hub_state() -> str:
    """Whether the Hub answers, or why it is not asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "offline: HF_HUB_OFFLINE=1 is set"
    try:
        with suppress(HTTPError):  # an answer, too
            urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=SECONDS_FOR_THE_HUB).close()
    except (OSError, ValueError) as error:  # ValueError: HF_ENDPOINT is no address
        return f"{constants.ENDPOINT} does not answer: {getattr(error, 'reason', error)}"
    return f"{constants.ENDPOINT} answers"


# --- the report -------------------------------------------------------------------------------------------------------


def print_facts(facts: Mapping[str, Any]) -> None:
    """All facts on stdout, for a person."""
    packages = {name: version or "not installed" for name, version in facts["packages"].items()}
    _section("Installation", {"python": facts["python"], **packages})
    _section("Metrics", {"known to pyiqa": _registration(facts["registration"]), **facts["metrics"]})
    gpus = {
        gpu["name"]: f"{gpu['description']}, {_size(gpu['memory'])}, {_size(gpu['free_memory'])} free"
        for gpu in facts["devices"] or ()
    }
    machine = {
        "system": f"{facts['system']}, {count(facts['cpu_cores'], 'core')}",
        "memory": f"{_size(facts['memory'])}, {_size(facts['free_memory'])} free",
    }
    _section("Machine", {**machine, **(gpus or {"GPU": "none that torch can use"})})
    if cache := facts["cache"]:
        stored = {
            name: f"{'complete' if cache['complete'][name] else 'incomplete'}, {_size(size)}" if size else "not there"
            for name, size in cache["stored"].items()
        }
        folder = f"{cache['folder']}, {_size(cache['free'])} of disk free"
        _section("Downloads", {"Hub": facts["hub"], "cache": folder, **stored})
    for problem in facts["problems"]:
        cli_output.out.print(Text.assemble(("problem: ", "bold red"), problem))
    if not facts["problems"]:
        cli_output.out.print(Text("The installation is sound.", style="green"))


def _section(title: str, facts: Mapping[str, str]) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=16)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(f"  {name}", Text(value))
    cli_output.out.print(Text(title, style="bold"), grid, Text(""))


def _registration(state: Mapping[str, Any]) -> str:
    if state["registered"]:
        return f"yes, by {state['started_by']}"
    return f"as soon as pyiqa is imported, by {state['started_by']}" if state["hook_installed"] else "no"


def _size(size: int | None) -> str:
    return "unknown" if size is None else readable_size(size)
