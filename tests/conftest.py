"""Shared fixtures: golden data copied into the tests, and `../shared` where it lies beside the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden"
SHARED = TESTS.parent.parent / "shared"

sys.path.insert(0, str(TESTS))  # test helpers are imported by plain name
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference numbers made by running the published code (`tests/golden/README.md`)."""
    return GOLDEN


@pytest.fixture(scope="session")
def shared() -> Path:
    """`../shared`, with the licensed tokenizer and the photos; tests that need it skip elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not beside this checkout")
    return SHARED
