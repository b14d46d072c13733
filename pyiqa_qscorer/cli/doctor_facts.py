"""Facts about this installation and machine, and whether each metric can run here."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from ..host.registration import RegistrationState, registration_state
from ..registry import METRICS
from .machine_facts import Cache, Machine, examine_cache, examine_machine
from .verdicts import Verdict, judge

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

LLAMA_MODULE = "transformers.models.llama.modeling_llama"


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
    machine = examine_machine(failure is None)
    cache = examine_cache(cache_dir) if failure is None else None
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
