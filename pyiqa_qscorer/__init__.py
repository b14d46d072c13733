"""Q-Scorer image quality metrics for pyiqa.

With the package installed, plain `import pyiqa` is enough for `pyiqa.create_metric("qscorer")`.
Importing this package makes the same happen where Python's start-up files do not run (`python -S`,
`PYTHONPATH`). Neither torch nor pyiqa is imported here: the public names load when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyiqa_qscorer.plugin import autoload as _autoload

if TYPE_CHECKING:
    from pyiqa_qscorer.checkpoints import load_checkpoint
    from pyiqa_qscorer.errors import CheckpointError, DownloadError, ImageError, QScorerError
    from pyiqa_qscorer.metric import QScorer
    from pyiqa_qscorer.names import METRICS, UnknownMetricError, UnknownOptionError
    from pyiqa_qscorer.plugin import RegistrationState, register, registration_state
    from pyiqa_qscorer.quality_loss import QScorerLoss
    from pyiqa_qscorer.scoring import FailedImagesError, ScoredImage, Scorer

__version__ = "0.1.0"

_MODULE_OF = {
    "METRICS": "names",
    "QScorer": "metric",
    "QScorerLoss": "quality_loss",
    "Scorer": "scoring",
    "ScoredImage": "scoring",
    "FailedImagesError": "scoring",
    "load_checkpoint": "checkpoints",
    "register": "plugin",
    "registration_state": "plugin",
    "RegistrationState": "plugin",
    "QScorerError": "errors",
    "CheckpointError": "errors",
    "DownloadError": "errors",
    "ImageError": "errors",
    "UnknownMetricError": "names",
    "UnknownOptionError": "names",
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
