"""The tree of the package and its layers: where files lie and who may import whom, read from the source."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from environments import REPOSITORY

PACKAGE = REPOSITORY / "pyiqa_qscorer"

LAYERS = [
    {"errors", "registry", "files"},
    {"report"},
    {"images", "prompt"},
    {"model"},
    {"checkpoints", "data"},
    {"metric"},
    {"scorer", "loss", "torchmetrics"},
    {"host"},
    {"analysis", "evaluation", "training", "synthetic", "serving", "ray"},
    {"cli"},
]
"""Top-level modules from bottom to top: each may import its own layer and those before."""

LONGEST_FILE = 350  # lines
FILES_AT_THE_ROOT = 10

LAYER_OF = {name: level for level, layer in enumerate(LAYERS) for name in layer}


class Import(NamedTuple):
    """One import statement: `module` imports `target` (dotted); `at_load` if importing module runs it."""

    module: str
    target: str
    line: int
    at_load: bool
    relative: bool

    @property
    def where(self) -> str:
        return f"{self.module}, line {self.line}, imports {self.target}"


def modules() -> dict[str, Path]:
    """Dotted name below the package ("model.vision", "" for the package itself) -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path) -> Iterator[Import]:
    """Every import of a file, with relative ones resolved; of `from x import y`, `x.y` where that is a module."""
    known = {f"pyiqa_qscorer.{name}".rstrip(".") for name in modules()}
    package = ["pyiqa_qscorer", *filter(None, module.split("."))]
    if path.name != "__init__.py":
        package.pop()

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, at_load, False)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                target = full if full in known else source
                yield Import(module, target, node.lineno, at_load, node.level > 0)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, at_load)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_load and not inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


@pytest.fixture(scope="module")
def all_imports() -> list[Import]:
    return [found for name, path in modules().items() for found in imports_of(name, path)]


def top(dotted: str) -> str:
    return dotted.split(".")[0]


def test_files_are_short_few_at_the_root_and_have_their_own_names() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules().values()}
    long = [f"{path.relative_to(PACKAGE)}: {count}" for path, count in lines.items() if count > LONGEST_FILE]
    assert not long, f"split these, the limit is {LONGEST_FILE} lines: {long}"
    names = Counter(path.name for path in modules().values() if path.name not in ("__init__.py", "__main__.py"))
    repeated = sorted(name for name, count in names.items() if count > 1)
    assert not repeated, f"name these so that a search finds one file: {repeated}"
    files = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(files) <= FILES_AT_THE_ROOT, f"at most {FILES_AT_THE_ROOT} files beside the folders: {files}"


def test_imports_inside_are_relative_and_the_model_is_torch_transformers_and_timm(all_imports: list[Import]) -> None:
    wrong = [found.where for found in all_imports if top(found.target) == "pyiqa_qscorer" and not found.relative]
    assert not wrong, "\n".join(wrong)
    allowed = {"torch", "transformers", "timm", "pyiqa_qscorer"} | sys.stdlib_module_names
    wrong = [found.where for found in all_imports if top(found.module) == "model" and top(found.target) not in allowed]
    assert not wrong, "\n".join(wrong)


def test_imports_point_down(all_imports: list[Import]) -> None:
    unplaced = {top(name) for name in modules() if name} - LAYER_OF.keys()
    assert not unplaced, f"say in LAYERS where these belong: {sorted(unplaced)}"
    wrong = []
    for found in all_imports:
        # From the package itself comes only its version; a name it re-exports has its own module.
        inner = top(found.target.removeprefix("pyiqa_qscorer."))
        ours = top(found.target) == "pyiqa_qscorer" and inner in LAYER_OF
        if found.module and ours and LAYER_OF[inner] > LAYER_OF[top(found.module)]:
            wrong.append(found.where)
    assert not wrong, "\n".join(wrong)


def test_no_module_needs_itself_to_load(all_imports: list[Import]) -> None:
    needs: dict[str, set[str]] = {name: set() for name in modules()}
    for found in all_imports:
        if found.at_load and top(found.target) == "pyiqa_qscorer":
            inner = found.target.removeprefix("pyiqa_qscorer").lstrip(".")
            if inner in needs and inner not in ("", found.module):
                needs[found.module].add(inner)
    while free := [name for name, needed in needs.items() if not needed]:
        for name in free:
            del needs[name]
        for needed in needs.values():
            needed.difference_update(free)
    assert not needs, f"import cycle among {sorted(needs)}"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("pyiqa", {"host"}),
        ("peft", {"checkpoints", "training"}),
        ("typer", {"cli"}),
        ("fastapi", {"serving"}),
        ("ray", {"ray", "cli"}),
    ],
)
def test_library_is_imported_only_in(library: str, allowed: set[str], all_imports: list[Import]) -> None:
    wrong = [found.where for found in all_imports if top(found.target) == library and top(found.module) not in allowed]
    assert not wrong, "\n".join(wrong)
