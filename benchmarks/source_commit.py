"""Which code a benchmark measured."""

from __future__ import annotations

import subprocess
from pathlib import Path


def source_commit() -> str:
    """Hash of the checked-out commit that this folder belongs to."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
    )
    return found.stdout.strip()
