"""The examples in docstrings run, and every public name has one."""

import doctest
import importlib

import pytest
from environments import REPOSITORY

import pyiqa_qscorer

WITHOUT_EXAMPLE = {"METRICS", "RegistrationState", "__version__"}
"""METRICS is a dict, whose example is its module's; the state is what `registration_state` returns."""

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules_with_examples() -> list[str]:
    """Dotted names of the modules whose source holds an example."""
    files = sorted((REPOSITORY / "pyiqa_qscorer").rglob("*.py"))
    with_examples = [path for path in files if ">>> " in path.read_text(encoding="utf-8")]
    parts = [path.relative_to(REPOSITORY).with_suffix("").parts for path in with_examples]
    return [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.attempted > 0
    assert result.failed == 0, "see the output above"


@pytest.mark.parametrize("name", sorted(set(pyiqa_qscorer.__all__) - WITHOUT_EXAMPLE))
def test_public_names_have_an_example(name: str) -> None:
    value = getattr(pyiqa_qscorer, name)
    if isinstance(value, type) and issubclass(value, Exception):
        assert value.__doc__  # says when it is raised
    else:
        assert ">>> " in (value.__doc__ or ""), f"{name} has no example in its docstring"
