"""Makes pyiqa know our metrics.

pyiqa looks a metric up in two places: `create_metric` and `list_models` in the dict
`pyiqa.default_model_configs.DEFAULT_CONFIGS`, which takes no entry points, and `build_network` in
`pyiqa.utils.registry.ARCH_REGISTRY`. Where one of these modules is already imported, it is
extended at once; and `FINDER` stays on `sys.meta_path` and extends it right after its own code has
run, whenever it is imported, reloaded, or removed from `sys.modules` and imported again. So pyiqa
is never imported from here, and nothing heavy is: the arch is entered by its import path and loads
with the first metric.

Ways in: the start-up file (`boot/`), `import pyiqa_qscorer`, `register()` and pyiqa's entry-point
group `pyiqa.archs`; any of them, in any order and any number of times.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..errors import QScorerError
from ..registry import ARCH_NAME, METRICS, pyiqa_config

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

METRIC_TABLE = "pyiqa.default_model_configs"
ARCH_TABLE = "pyiqa.utils.registry"
ARCH_PATH = "pyiqa_qscorer.metric:QScorer"
LOSS_NAME = "QScorerLoss"
LOSS_PATH = "pyiqa_qscorer.loss:QScorerLoss"
AUTOLOAD_VARIABLE = "PYIQA_QSCORER_AUTOLOAD"
_BOOT_MODULE = "_pyiqa_qscorer_boot"

_history: dict[str, str] = {}


@dataclass(frozen=True)
class RegistrationState:
    """How this process stands with pyiqa.

    Attributes:
        switched_off: `PYIQA_QSCORER_AUTOLOAD=0` is set.
        startup_file_ran: Python's start-up files were read for us; not so under `python -S` or with `PYTHONPATH`.
        hook_installed: A finder of ours stands on `sys.meta_path`.
        pyiqa_imported: pyiqa's table of metrics has been imported.
        metrics: Our metric names that pyiqa knows by now.
        arch: "module:Class" that pyiqa's arch registry has under `QScorer`.
        started_by: What began the registration: "startup file", "import" or "register()".
        problem: Why the last registration that failed did so.
    """

    switched_off: bool
    startup_file_ran: bool
    hook_installed: bool
    pyiqa_imported: bool
    metrics: tuple[str, ...]
    arch: str | None
    started_by: str | None
    problem: str | None

    @property
    def registered(self) -> bool:
        """Whether pyiqa has every metric name and our arch."""
        return len(self.metrics) == len(METRICS) and _is_ours(self.arch)


def register() -> None:
    """Make pyiqa know our metrics, now or as soon as it is imported, whatever the off switch says.

    Needed only where `PYIQA_QSCORER_AUTOLOAD=0` is set, or where another import hook answers for pyiqa so that
    ours is not asked; else plain `import pyiqa`, or `import pyiqa_qscorer` before or after it, does the same.
    Idempotent. Does not import pyiqa.

    Raises:
        QScorerError: pyiqa has something else under one of our names, or is older than 0.1.16.

    Example:
        >>> register()
    """
    _history.setdefault("started by", "register()")
    problem: Exception | None = None
    FINDER.install()  # first: whoever imports a table meanwhile is caught either way
    for name in EXTENSIONS.keys() & sys.modules.keys():
        try:
            # import_module, since it waits where another thread is still running that module.
            EXTENSIONS[name](import_module(name))
        except Exception as error:  # raised below, after the other table has had its turn
            problem = problem or error
    if problem is not None:
        _history["problem"] = _describe(problem)
        raise problem


def autoload() -> None:
    """`register()` as importing the package does it: not if switched off, warning if it fails."""
    if _is_switched_off():
        return
    _history.setdefault("started by", "startup file" if _BOOT_MODULE in sys.modules else "import")
    try:
        register()
    except Exception as error:  # `import pyiqa` may have brought us here, and must go on
        _warn(error)


def register_from_entry_point() -> None:
    """Entry point `pyiqa.archs`: pyiqa calls it when its arch registry is first searched."""
    if not _is_switched_off():
        register()


def register_train_model() -> None:
    """Entry point `pyiqa.models`: training from a pyiqa YAML with `model_type: QScorerTrainModel`."""
    from .train_model import QScorerTrainModel  # noqa: F401  (the class registers itself)


def register_loss() -> None:
    """Entry point `pyiqa.losses`: `type: QScorerLoss` in a training YAML. Idempotent, loads with its first use.

    Raises:
        QScorerError: pyiqa has another loss under that name.
    """
    if _is_switched_off():
        return
    _add_lazily("loss", import_module(ARCH_TABLE).LOSS_REGISTRY, LOSS_NAME, LOSS_PATH)


def registration_state() -> RegistrationState:
    """How this process stands with pyiqa. Imports nothing, changes nothing.

    Example:
        >>> registration_state().problem is None
        True
    """
    configs = getattr(sys.modules.get(METRIC_TABLE), "DEFAULT_CONFIGS", None)
    registry = getattr(sys.modules.get(ARCH_TABLE), "ARCH_REGISTRY", None)
    return RegistrationState(
        switched_off=_is_switched_off(),
        startup_file_ran=_BOOT_MODULE in sys.modules,
        hook_installed=any(_is_finder_of_ours(finder) for finder in sys.meta_path),
        pyiqa_imported=configs is not None,
        metrics=tuple(name for name in METRICS if _has_our_type((configs or {}).get(name))),
        arch=_path_in(registry, ARCH_NAME),
        started_by=_history.get("started by"),
        problem=_history.get("problem"),
    )


def _is_switched_off() -> bool:
    return os.environ.get(AUTOLOAD_VARIABLE) == "0"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _warn(error: Exception) -> None:
    _history["problem"] = _describe(error)
    warnings.warn(
        f"pyiqa-qscorer could not add all its metrics to pyiqa: {_describe(error)}. "
        f"Set {AUTOLOAD_VARIABLE}=0 to use pyiqa without them.",
        RuntimeWarning,
        stacklevel=3,
    )


def _add_metrics(module: ModuleType) -> None:
    configs = module.DEFAULT_CONFIGS
    for name in METRICS:
        configs.setdefault(name, pyiqa_config(name))
    foreign = [name for name in METRICS if not _has_our_type(configs[name])]
    if foreign:
        raise QScorerError(
            f"pyiqa already has, from elsewhere, what pyiqa-qscorer calls {', '.join(foreign)}; left as it was"
        )


def _has_our_type(config: Any) -> bool:
    return isinstance(config, dict) and config.get("metric_opts", {}).get("type") == ARCH_NAME


def _add_arch(module: ModuleType) -> None:
    _add_lazily("arch", module.ARCH_REGISTRY, ARCH_NAME, ARCH_PATH)


def _add_lazily(kind: str, registry: Any, name: str, path: str) -> None:
    present = _path_in(registry, name)
    if _is_ours(present):
        return
    if present is not None:
        raise QScorerError(f"pyiqa's {kind} registry already has {name!r}, from {present!r}; left as it was")
    if not hasattr(registry, "register_lazy"):
        raise QScorerError("this pyiqa is too old: pyiqa-qscorer needs pyiqa>=0.1.16")
    registry.register_lazy(name, path)


def _path_in(registry: Any, name: str) -> str | None:
    """What a registry has under a name, as "module:Class".

    Read from its private dicts, since the public ways (`in`, `get`) load every plugin's entry
    points or the arch itself.
    """
    found = getattr(registry, "_obj_map", {}).get(name) or getattr(registry, "_lazy_map", {}).get(name)
    return found if found is None or isinstance(found, str) else f"{found.__module__}:{found.__qualname__}"


def _is_ours(path: str | None) -> bool:
    return path is not None and path.startswith("pyiqa_qscorer.")


EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {METRIC_TABLE: _add_metrics, ARCH_TABLE: _add_arch}


def _is_finder_of_ours(finder: Any) -> bool:
    # By mark, not class: there is also the boot module's, and an older `Finder` after a reload.
    return getattr(finder, "is_pyiqa_qscorer", False) is True


class Finder:
    """Finds pyiqa's two tables as they are, and has them extended once their own code has run."""

    is_pyiqa_qscorer = True

    def install(self) -> None:
        """Stand on `sys.meta_path`, in the place of the boot module's finder or of an older copy of this module."""
        with _lock:
            for index, finder in enumerate(sys.meta_path):
                if _is_finder_of_ours(finder):
                    sys.meta_path[index] = self  # not removed: an import under way would skip the next finder
                    return
            sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders say, its loader wrapped, if `name` is one of the tables; else None."""
        if name not in EXTENSIONS:
            return None
        for finder in list(sys.meta_path):
            if _is_finder_of_ours(finder) or not hasattr(finder, "find_spec"):
                continue
            spec: ModuleSpec | None = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _ExtendingLoader(spec.loader, name)  # type: ignore[assignment]
                return spec
        return None


_lock = Lock()
FINDER = Finder()


class _ExtendingLoader:
    """A module's own loader in all but `exec_module`, after which the module is extended."""

    def __init__(self, loader: Any, name: str) -> None:
        self._loader = loader
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "_loader":  # not set yet, as while copying: do not look for it for ever
            raise AttributeError(attribute)
        return getattr(self._loader, attribute)

    def exec_module(self, module: ModuleType) -> None:
        # The module itself never shows that it was wrapped.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            # By the copy of our module that `sys.modules` has: it may have been removed there and imported again.
            import_module(__name__).EXTENSIONS[self._name](module)
        except Exception as error:  # pyiqa's import must go on, with or without our names
            _warn(error)
