"""A machine that knows one Hub, on loopback, for the tests of downloads.

Every fetch runs in a process of its own, because huggingface_hub reads HF_ENDPOINT, HF_HOME and
HF_HUB_OFFLINE when it is imported, and because a user's retry is a new process, too.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE

import pyiqa_qscorer

REPO = "lab/model"
WEIGHTS = "model.safetensors"
CHUNK = DOWNLOAD_CHUNK_SIZE  # http_get writes the disk in such pieces
BIG = bytes(range(256)) * (5 * CHUNK // 512)  # two and a half pieces: 26 MB
FILES = {
    "config.json": b'{"model_type": "qscorer"}',
    "tokenizer.model": b"\x00pieces" * 100,
    WEIGHTS: b"\x07weights" * 1000,
    "README.md": b"# card",
    "figure.png": b"\x89PNG",
    "modeling.py": b"raise SystemExit",
}
NEEDED = {"config.json", "tokenizer.model", WEIGHTS}

# The package `checkpoints` imports torch, which takes seconds; `hub` inside it does not, so it is
# loaded past it. Pauses between attempts are cut short: how long they are is not tested.
RUN_HUB = """
import json, sys, time, types
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02))
package = types.ModuleType("pyiqa_qscorer.checkpoints")
package.__path__ = [sys.argv[1]]
sys.modules[package.__name__] = package
from pyiqa_qscorer.checkpoints import hub
from pyiqa_qscorer.errors import QScorerError
exec(sys.argv[3])
result = {"heavy": sorted({"torch", "transformers"} & set(sys.modules))}
try:
    plans = [hub.plan(*args, **kwargs) for args, kwargs in json.loads(sys.argv[2])]
    result["missing_bytes"] = [plan.missing_bytes for plan in plans]
    result["folders"] = [str(folder) for folder in hub.download(plans)]
except QScorerError as error:
    result.update(error=type(error).__name__, message=str(error))
print(json.dumps(result))
"""


@dataclass
class Outcome:
    """How a process that called `hub.plan` and `hub.download` ended."""

    folders: list[Path]
    missing_bytes: list[int]
    error: str | None
    message: str
    stderr: str

    @property
    def folder(self) -> Path:
        assert self.error is None, f"{self.error}: {self.message}"
        return self.folders[0]

    def fails(self, *words: str) -> str:
        """Check that it ended with a `DownloadError` that says all `words`."""
        assert self.error == "DownloadError", (self.error, self.message, self.folders)
        for word in words:
            assert word in self.message, f"{word!r} not in: {self.message}"
        return self.message


@dataclass
class Machine:
    """A user's machine: its home folder, and the one Hub that it knows."""

    server: HubServer
    home: Path

    @property
    def cache(self) -> Path:
        return self.home / "hf" / "hub"

    def start(
        self, calls: list[tuple[list[object], dict[str, object]]], before: str, env: dict[str, str]
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN_HUB, str(Path(pyiqa_qscorer.__file__).with_name("checkpoints"))]
        where = {"env": self.server.environment(self.home, **env), "cwd": Path(__file__).resolve().parent.parent}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, json.dumps(calls), before], **where, **pipes)

    def finish(self, process: subprocess.Popen[str]) -> Outcome:
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr[-3000:]
        result = json.loads(stdout)
        assert not result["heavy"], f"hub must not import {result['heavy']}"
        folders, message = [Path(folder) for folder in result.get("folders", [])], result.get("message", "")
        return Outcome(folders, result.get("missing_bytes", []), result.get("error"), message, stderr)

    def fetch(
        self, repo_id: str = REPO, *args: object, before: str = "", env: dict[str, str] | None = None, **kwargs: object
    ) -> Outcome:
        """`hub.plan(repo_id, *args, **kwargs)` and `hub.download` in a new process."""
        return self.fetch_all([([repo_id, *args], kwargs)], before, env)

    def fetch_all(
        self, calls: list[tuple[list[object], dict[str, object]]], before: str = "", env: dict[str, str] | None = None
    ) -> Outcome:
        return self.finish(self.start(calls, before, env or {}))

    def offline(self, repo_id: str = REPO, *args: object) -> Outcome:
        """The same without network; not one request may leave."""
        self.server.requests.clear()
        outcome = self.fetch(repo_id, *args, env={"HF_HUB_OFFLINE": "1"})
        assert self.server.requests == []
        return outcome

    def partial_files(self) -> list[Path]:
        return sorted(self.cache.glob("models--*/blobs/*.incomplete"))


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def machine(server: HubServer, tmp_path: Path) -> Machine:
    return Machine(server, tmp_path)


@pytest.fixture
def small(server: HubServer) -> str:
    """The small repository; returns its commit."""
    return server.add_repo(REPO, FILES)


@pytest.fixture
def big(server: HubServer) -> str:
    """The same with weights that take three writes to the disk; returns its commit."""
    return server.add_repo(REPO, {**FILES, WEIGHTS: BIG})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
