"""Q-Scorer image quality metrics for pyiqa.

With the package installed, plain `import pyiqa` is enough for `pyiqa.create_metric("qscorer")`.
Importing this package makes the same happen where Python's start-up files do not run (`python -S`,
`PYTHONPATH`). Neither torch nor pyiqa is imported here: what needs torch loads when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    CheckpointError,
    DownloadError,
    FailedImagesError,
    ImageError,
    QScorerError,
    UnknownMetricError,
    UnknownOptionError,
)
from .host.registration import RegistrationState, register, registration_state
from .host.registration import autoload as _autoload
from .registry import METRICS

if TYPE_CHECKING:
    from .checkpoints import load_checkpoint
    from .loss import QScorerLoss
    from .metric import QScorer
    from .scorer import ScoredImage, Scorer

__version__ = "0.1.0"

_MODULE_OF = {  # what imports torch
    "QScorer": "metric",
    "QScorerLoss": "loss",
    "ScoredImage": "scorer",
    "Scorer": "scorer",
    "load_checkpoint": "checkpoints",
}

__all__ = [
    "METRICS",
    "CheckpointError",
    "DownloadError",
    "FailedImagesError",
    "ImageError",
    "QScorer",
    "QScorerError",
    "QScorerLoss",
    "RegistrationState",
    "ScoredImage",
    "Scorer",
    "UnknownMetricError",
    "UnknownOptionError",
    "__version__",
    "load_checkpoint",
    "register",
    "registration_state",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_autoload()
