"""The command line run in this process, and what is needed to run it in one of its own."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pyiqa_qscorer.cli import app as cli

TESTS = Path(__file__).resolve().parent


class Result:
    """Exit code and output of a command; an exception that is no exit is raised."""

    def __init__(self, *arguments: object, stdin: bytes | None = None) -> None:
        result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr
        self.out_bytes = result.stdout_bytes


def program(**environment: object) -> dict[str, Any]:
    """Keyword arguments of `subprocess` for a program of the tests."""
    variables = {name: str(value) for name, value in environment.items()}
    path = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    return {"env": os.environ | path | variables, "text": True}


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def full_disk(file_size: int) -> Iterator[None]:
    """No file of this process can grow beyond that many bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[list[str]]:
    """A file system of that size at an empty folder: the command that mounts it, to be given other options with it."""
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder), "-o"]
    if not sys.platform.startswith("linux") or subprocess.run([*mount, f"size={size}"]).returncode != 0:
        pytest.skip("may not mount a small file system here (needs root)")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def server_of(*command: str, folder: Path | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command that serves on a free port of this machine: its process and address; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pyiqa_qscorer.cli", *command, "--port", "0", "--device", "cpu"],
        # As many threads as here: with another number the last bit of a score can differ.
        env=os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        found = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)), None)
        assert found is not None, f"ended with {process.wait(30)} and served nothing"
        yield process, found[0]
    finally:
        process.kill()
        process.wait()
