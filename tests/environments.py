"""Fresh interpreters for the registration and packaging tests: subprocesses, throw-away environments, a toy pyiqa."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import venv
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent

# What pyiqa does with its two tables, in a package that imports in a millisecond instead of seconds.
TOY_PYIQA = {
    "__init__.py": "from .api_helpers import list_models",
    "api_helpers.py": """
        from pyiqa.default_model_configs import DEFAULT_CONFIGS
        from pyiqa.utils import registry
        def list_models():
            return sorted(DEFAULT_CONFIGS)
    """,
    "default_model_configs.py": """
        DEFAULT_CONFIGS = {"toy": {"metric_opts": {"type": "Toy"}, "metric_mode": "NR"}}
    """,
    "utils/__init__.py": "",
    "utils/registry.py": """
        class Registry:
            def __init__(self):
                self._obj_map, self._lazy_map = {}, {}
            def register_lazy(self, name, path):
                if name in self._lazy_map:
                    raise AssertionError(name)
                self._lazy_map[name] = path
        ARCH_REGISTRY = Registry()
    """,
}


def write_toy_pyiqa(folder: Path, changed: dict[str, str] | None = None) -> Path:
    """A package `pyiqa` inside `folder`; `changed` replaces files."""
    for name, text in TOY_PYIQA.items():
        path = folder / "pyiqa" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent((changed or {}).get(name, text)), encoding="utf-8")
    return folder


def run_python(
    code: str, *flags: str, python: str | Path = sys.executable, path: tuple[Path, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter, with `path` as PYTHONPATH; it must exit with 0."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYIQA_QSCORER_AUTOLOAD")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path))} if path else {}
    with tempfile.TemporaryDirectory() as elsewhere:  # Python puts the current folder on its path
        done = subprocess.run(
            [str(python), *flags, "-c", textwrap.dedent(code)],
            env=env | environment,
            cwd=elsewhere,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON that a script printed as its last line."""
    return json.loads(done.stdout.splitlines()[-1])


class Environment:
    """An empty virtual environment that sees the packages of this one, but none of its start-up files."""

    def __init__(self, folder: Path) -> None:
        venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        paths = "import json, sysconfig; print(json.dumps(sysconfig.get_paths()['purelib']))"
        self.site_packages = Path(answer(run_python(paths, python=self.python)))
        # Last by name, so that what is installed here comes first.
        own = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        (self.site_packages / "zz_packages_of_the_tests.pth").write_text("\n".join(own))

    def pip(self, *arguments: str) -> None:
        """Run pip for this environment, offline."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        env = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    def install(self, *what: str) -> None:
        """Install without dependencies, build isolation or network."""
        self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "-I", *what)

    def files(self) -> set[str]:
        """Names at the top level of its site-packages and of its folder of commands."""
        folders = (self.site_packages, self.python.parent)
        return {p.name for folder in folders for p in folder.iterdir() if p.name != "__pycache__"}
