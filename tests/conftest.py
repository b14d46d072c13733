"""Shared fixtures: golden data copied into the tests, and `../shared` where it lies beside the checkout."""

from __future__ import annotations

import gc
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pyiqa_qscorer.metric import QScorer

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden"
SHARED = TESTS.parent.parent / "shared"

sys.path.insert(0, str(TESTS))  # test helpers are imported by plain name
torch.set_num_threads(2)


def pytest_collection_finish() -> None:
    """What the imports have made stays: garbage collection, which memory is measured after, need not go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference numbers made by running the published code (`tests/golden/README.md`)."""
    return GOLDEN


@pytest.fixture(scope="session")
def shared() -> Path:
    """`../shared`, with the licensed tokenizer and the photos; tests that need it skip elsewhere."""
    if not SHARED.is_dir():
        pytest.skip(
            "nothing is wrong: compares with opinions, pictures or the LLaMA tokenizer, whose owners do not "
            "let us copy them here; runs where they lie in ../shared (CONTRIBUTING.md)"
        )
    return SHARED


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for 56 x 56 pixels, which is fast."""
    from tiny_checkpoint import own_folder

    return own_folder(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """LoRA, base and merged folder; not to be changed. The stand-in tokenizer is read faster than the licensed one."""
    from tiny_checkpoint import published_folders

    return published_folders(tmp_path_factory.mktemp("published"), stand_in=True)


@pytest.fixture
def copies(folders: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, ...]:
    """The same, to be changed."""
    return tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in folders)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What small trainings train on."""
    from tiny_training import make_pictures

    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random backbone of another family than the published one."""
    from tiny_multimodal import write_base

    return write_base("llava", tmp_path_factory.mktemp("llava") / "base")


@pytest.fixture
def rendering_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are rendered in this process: one of their own takes seconds to begin."""
    monkeypatch.setattr("pyiqa_qscorer.synthetic.rendering.ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))


@pytest.fixture
def small(own: Path) -> QScorer:
    from pyiqa_qscorer.metric import QScorer

    return QScorer(own)
