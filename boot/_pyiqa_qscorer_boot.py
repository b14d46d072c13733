"""Lets plain `import pyiqa` know the metrics of pyiqa-qscorer.

`_pyiqa_qscorer_boot.pth` calls `install()` whenever this Python starts (`.start`: the same from
Python 3.15 on, PEP 829). All that happens then is one small object on `sys.meta_path`; only when
pyiqa imports its table of metrics is `pyiqa_qscorer` imported, which adds its names to that table
and puts its own finder in the place of the object.

Off switch: environment variable PYIQA_QSCORER_AUTOLOAD=0.
"""

import os
import sys

METRIC_TABLE = "pyiqa.default_model_configs"


def is_switched_off() -> bool:
    return os.environ.get("PYIQA_QSCORER_AUTOLOAD") == "0"


class BootFinder:
    """Import finder that hands pyiqa's table of metrics over to `pyiqa_qscorer.host.registration`."""

    is_pyiqa_qscorer = True  # the mark by which `host.registration` finds this object again

    def find_spec(self, name: str, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != METRIC_TABLE or is_switched_off():
            return None
        try:
            from pyiqa_qscorer.host.registration import FINDER
        except Exception as error:  # whatever is wrong with us, pyiqa itself must import
            import warnings

            warnings.warn(
                "pyiqa-qscorer could not add its metrics to pyiqa: importing pyiqa_qscorer raised "
                f"{type(error).__name__}: {error}. Reinstall or uninstall pyiqa-qscorer, or set "
                "PYIQA_QSCORER_AUTOLOAD=0 to use pyiqa without it.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return FINDER.find_spec(name, path, target)


def install() -> None:
    """Put the finder on `sys.meta_path`, unless switched off or already there."""
    if not is_switched_off() and not any(hasattr(f, "is_pyiqa_qscorer") for f in sys.meta_path):
        sys.meta_path.insert(0, BootFinder())
