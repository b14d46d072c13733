"""Which code a benchmark measured."""

from __future__ import annotations

import subprocess
from pathlib import Path


def source_commit() -> str | None:
    """Hash of the checked-out commit that this folder belongs to; None where it is no git checkout."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):  # what was measured is worth more than its commit
        return None
    return found.stdout.strip()
