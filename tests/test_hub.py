"""Downloads against a real server on loopback: what is fetched, resumed, refused, and said about it.

Every fetch runs in a process of its own, because huggingface_hub reads HF_ENDPOINT, HF_HOME and
HF_HUB_OFFLINE when it is imported, and because a user's retry is a new process, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import BASE_REPO, LORA_REPO, TOKEN, HubServer, serve_published_layout

from pyiqa_qscorer.checkpoints import hub
from pyiqa_qscorer.errors import CheckpointError

REPO = "lab/model"
WEIGHTS = "model.safetensors"
CHUNK = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE  # http_get writes the disk in such pieces
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

# The package `checkpoints` imports torch, which takes seconds; its `hub` module does not. Pauses
# between attempts are cut short: how long they are is not tested.
RUN_HUB = """
import json, sys, time, types
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02))
package = types.ModuleType("pyiqa_qscorer.checkpoints")
package.__path__ = [sys.argv[1]]
sys.modules[package.__name__] = package
from pyiqa_qscorer.checkpoints import hub
from pyiqa_qscorer.errors import QScorerError
exec(sys.argv[3])
result = {"torch": "torch" in sys.modules}
try:
    plans = [hub.plan(*args, **kwargs) for args, kwargs in json.loads(sys.argv[2])]
    result["missing_bytes"] = [plan.missing_bytes for plan in plans]
    result["folders"] = [str(folder) for folder in hub.download(plans, needed_for="qscorer")]
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
        command = [sys.executable, "-c", RUN_HUB, str(Path(hub.__file__).parent)]
        environment = self.server.environment(self.home, **env)
        return subprocess.Popen(
            [*command, json.dumps(calls), before],
            env=environment,
            cwd=Path(__file__).resolve().parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> Outcome:
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr[-3000:]
        result = json.loads(stdout)
        assert not result["torch"], "hub.py must not import torch"
        return Outcome(
            [Path(folder) for folder in result.get("folders", [])],
            result.get("missing_bytes", []),
            result.get("error"),
            result.get("message", ""),
            stderr,
        )

    def fetch(
        self,
        repo_id: str = REPO,
        *args: object,
        before: str = "",
        env: dict[str, str] | None = None,
        **kwargs: object,
    ) -> Outcome:
        """`hub.plan(repo_id, *args, **kwargs)` and `hub.download` in a new process."""
        return self.fetch_all([([repo_id, *args], kwargs)], before, env)

    def fetch_all(
        self,
        calls: list[tuple[list[object], dict[str, object]]],
        before: str = "",
        env: dict[str, str] | None = None,
    ) -> Outcome:
        return self.finish(self.start(calls, before, env or {}))

    def offline(self, repo_id: str = REPO, *args: object) -> Outcome:
        """The same without network; not one request may leave."""
        self.server.forget_requests()
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


def bytes_of(server: HubServer, name: str) -> int:
    return sum(request.bytes_sent for request in server.contents_of(name))


# ---------------------------------------------------------------- what is fetched, and when


def test_first_download_takes_what_a_checkpoint_needs(machine: Machine, small: str) -> None:
    outcome = machine.fetch()
    assert contents(outcome.folder) == {name: FILES[name] for name in NEEDED}
    assert outcome.missing_bytes == [sum(len(FILES[name]) for name in NEEDED)]
    assert outcome.stderr.count("Downloading") == 0  # small: nothing to announce
    # It is the ordinary Hub cache: huggingface_hub finds the file there by branch name.
    found = huggingface_hub.try_to_load_from_cache(REPO, WEIGHTS, cache_dir=machine.cache)
    assert found == str(outcome.folder / WEIGHTS)
    assert [repo.repo_id for repo in huggingface_hub.scan_cache_dir(machine.cache).repos] == [REPO]
    assert not machine.partial_files()


def test_second_run_works_offline_without_a_request(machine: Machine, small: str) -> None:
    folder = machine.fetch().folder
    assert machine.offline().folder == folder
    machine.server.forget_requests()
    assert machine.fetch(local_files_only=True).folder == folder
    assert machine.fetch(REPO, small).folder == folder  # a commit hash cannot change
    assert machine.server.requests == []
    assert machine.fetch().folder == folder  # a branch can: one question, no content
    assert [request.path for request in machine.server.requests] == [f"/api/models/{REPO}/revision/main"]


def test_the_server_may_be_down_once_all_is_here(machine: Machine, small: str) -> None:
    folder = machine.fetch().folder
    machine.server.listing_status = 503
    assert machine.fetch().folder == folder
    machine.server.close()
    outcome = machine.fetch()
    assert outcome.folder == folder
    assert "Could not ask" in outcome.stderr and "Using the cached copy" in outcome.stderr


def test_a_mirror_is_set_by_hf_endpoint(machine: Machine, small: str) -> None:
    with HubServer() as mirror:
        mirror.add_repo(REPO, {**FILES, WEIGHTS: b"from the mirror"})
        folder = machine.fetch(env={"HF_ENDPOINT": mirror.endpoint}).folder
    assert (folder / WEIGHTS).read_bytes() == b"from the mirror"
    assert machine.server.requests == []


def test_cache_dir_and_hf_hub_cache(machine: Machine, small: str, tmp_path: Path) -> None:
    folder = machine.fetch(cache_dir=str(tmp_path / "mine")).folder
    assert folder.is_relative_to(tmp_path / "mine")
    folder = machine.fetch(env={"HF_HUB_CACHE": str(tmp_path / "other")}).folder
    assert folder.is_relative_to(tmp_path / "other")
    assert not machine.cache.exists()


def test_revisions_are_kept_apart(machine: Machine, small: str) -> None:
    machine.server.add_repo(REPO, {**FILES, WEIGHTS: b"second"})
    machine.server.repos[REPO].refs["v1"] = small
    assert (machine.fetch(REPO, small).folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert (machine.fetch(REPO, "v1").folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert (machine.fetch().folder / WEIGHTS).read_bytes() == b"second"
    assert machine.offline(REPO, "v1").folder.name == small
    machine.offline(REPO, "v2").fails(REPO, "'v2'", "is not in the cache", "HF_HUB_OFFLINE")


def test_a_new_commit_with_the_same_weights_moves_no_weights(machine: Machine, small: str) -> None:
    machine.fetch()
    machine.server.add_repo(REPO, {**FILES, "README.md": b"# better card"})
    machine.server.forget_requests()
    outcome = machine.fetch()
    assert outcome.missing_bytes == [0] and outcome.folder.name != small
    assert contents(outcome.folder) == {name: FILES[name] for name in NEEDED}
    assert not machine.server.contents_of(WEIGHTS)


def test_an_interrupted_update_leaves_the_old_version_usable(machine: Machine, small: str) -> None:
    folder = machine.fetch().folder
    machine.server.add_repo(REPO, {**FILES, WEIGHTS: b"second"})
    machine.server.fail(WEIGHTS, 403)
    machine.fetch().fails(REPO)
    assert machine.offline().folder == folder


def test_published_layout(tmp_path: Path, golden: Path) -> None:
    server, env = serve_published_layout(tmp_path, golden)
    assert env["HF_ENDPOINT"] == server.endpoint
    with server:
        machine = Machine(server, tmp_path)
        lora, base = machine.fetch_all([([LORA_REPO], {}), ([BASE_REPO], {})]).folders
    expected = {path.name for path in (golden / "official_lora_layout").iterdir()} - {"README.md"}
    assert {path.name for path in lora.iterdir()} == expected
    assert contents(base) == contents(golden / "base")


def test_two_processes_share_one_download(machine: Machine, big: str) -> None:
    machine.server.hang(WEIGHTS, after=CHUNK)
    calls: list[tuple[list[object], dict[str, object]]] = [([REPO], {})]
    first = machine.start(calls, "", {"HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    wait_for(lambda: bytes_of(machine.server, WEIGHTS) >= CHUNK)
    second = machine.start(calls, "", {})
    assert machine.finish(first).folder == machine.finish(second).folder
    assert bytes_of(machine.server, WEIGHTS) == len(BIG)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# ---------------------------------------------------------------- interrupted and resumed


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_cut_connection_is_resumed_in_the_same_call(machine: Machine, big: str, reset: bool) -> None:
    machine.server.cut(WEIGHTS, after=CHUNK + 5_000_000, reset=reset)
    assert (machine.fetch().folder / WEIGHTS).read_bytes() == BIG
    ranges = [request.range for request in machine.server.contents_of(WEIGHTS)]
    assert ranges == [None, f"bytes={CHUNK}-"]


def test_a_connection_that_never_holds_ends_and_the_next_run_resumes(machine: Machine, big: str) -> None:
    machine.server.cut(WEIGHTS, after=CHUNK + 100)  # some progress, then none
    machine.server.cut(WEIGHTS, after=100, times=None)
    outcome = machine.fetch()
    outcome.fails(WEIGHTS, REPO, "connection was lost", "10.5 MB of 26.2 MB", "Try again")
    assert len(machine.server.contents_of(WEIGHTS)) < 40  # bounded
    assert [path.stat().st_size for path in machine.partial_files()] == [CHUNK]
    machine.offline().fails("only partly in the cache", "1 of 3 files", WEIGHTS, "resumed")

    machine.server.faults.clear()
    machine.server.forget_requests()
    outcome = machine.fetch()
    assert (outcome.folder / WEIGHTS).read_bytes() == BIG
    assert outcome.missing_bytes == [len(BIG) - CHUNK]
    (request,) = machine.server.contents_of(WEIGHTS)
    assert (request.range, request.bytes_sent) == (f"bytes={CHUNK}-", len(BIG) - CHUNK)
    assert not machine.partial_files()


def test_a_killed_process_is_resumed_by_the_next(machine: Machine, big: str) -> None:
    machine.server.hang(WEIGHTS, after=CHUNK + 1)
    process = machine.start([([REPO], {})], "", {})
    wait_for(lambda: [path.stat().st_size for path in machine.partial_files()] == [CHUNK])
    process.kill()
    process.communicate()
    machine.server.forget_requests()
    assert (machine.fetch().folder / WEIGHTS).read_bytes() == BIG
    (request,) = machine.server.contents_of(WEIGHTS)
    assert (request.range, request.bytes_sent) == (f"bytes={CHUNK}-", len(BIG) - CHUNK)
    assert not machine.partial_files()


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * (len(BIG) + 1)], ids=["damaged", "too long"])
def test_a_useless_partial_file_is_replaced(machine: Machine, big: str, left: bytes) -> None:
    sha256 = machine.server.file(REPO, WEIGHTS).sha256
    blobs = machine.cache / "models--lab--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256}.incomplete").write_bytes(left)
    assert (machine.fetch().folder / WEIGHTS).read_bytes() == BIG
    assert not machine.partial_files()


@pytest.mark.parametrize("status", [500, 429])
def test_a_busy_server_is_asked_again(machine: Machine, small: str, status: int) -> None:
    machine.server.fail(WEIGHTS, status)
    assert (machine.fetch().folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_a_file_cut_short_in_the_cache_is_fetched_again(machine: Machine, small: str) -> None:
    weights = machine.fetch().folder / WEIGHTS
    weights.resolve().write_bytes(b"short")
    machine.offline().fails("only partly in the cache", WEIGHTS)
    assert (machine.fetch().folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]


# ---------------------------------------------------------------- refused


def test_repository_not_found(machine: Machine) -> None:
    machine.fetch("lab/typo").fails("'lab/typo' was not found", machine.server.endpoint, "spelling")


def test_revision_not_found(machine: Machine, small: str) -> None:
    machine.fetch()
    machine.fetch(REPO, "v9").fails(f"{REPO!r} has no revision 'v9'", "branch", "tag")


def test_gated_repository(machine: Machine, server: HubServer) -> None:
    server.add_repo("lab/open", FILES)
    server.add_repo(REPO, FILES, gated=True)
    both: list[tuple[list[object], dict[str, object]]] = [(["lab/open"], {}), ([REPO], {})]
    outcome = machine.fetch_all(both)
    outcome.fails(REPO, "gated", "accept its licence", "HF_TOKEN", f"{server.endpoint}/{REPO}")
    assert not any("/resolve/" in request.path for request in server.requests)  # of either

    machine.fetch(env={"HF_TOKEN": "hf_wrong"}).fails("refused the access token", "HF_TOKEN")
    assert machine.fetch_all(both, env={"HF_TOKEN": TOKEN}).error is None
    to_cdn = [request for request in server.requests if request.host == "cdn"]
    assert to_cdn and not any(request.authorized for request in to_cdn)  # the token stays at home


def test_forbidden_file(machine: Machine, small: str) -> None:
    machine.server.fail(WEIGHTS, 403, times=None)
    machine.fetch().fails("closed to you", REPO, "HF_TOKEN")


def test_not_a_hub(machine: Machine) -> None:
    outcome = machine.fetch(env={"HF_ENDPOINT": machine.server.cdn})  # answers with a web page
    outcome.fails(f"Could not ask {machine.server.cdn}", "HF_ENDPOINT")


def test_unreachable(machine: Machine) -> None:
    machine.server.close()
    outcome = machine.fetch()
    outcome.fails(REPO, f"Could not ask {machine.server.endpoint}", "connection", "mirror", "folder")


def test_nothing_that_is_a_checkpoint(machine: Machine, server: HubServer) -> None:
    server.add_repo(REPO, {"README.md": b"#", "data.csv": b"1"})
    outcome = machine.fetch()
    assert outcome.error == "CheckpointError"
    assert "README.md, data.csv" in outcome.message and "config.json" in outcome.message


# ---------------------------------------------------------------- damaged


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_corrupted_content_never_enters_the_cache(machine: Machine, small: str, name: str) -> None:
    machine.server.corrupt(name)
    message = machine.fetch().fails(name, REPO, "damaged", "hash", "deleted", "Try again")
    assert machine.server.endpoint not in message  # names the repository, not an internal address
    blobs = {path.name for path in (machine.cache / "models--lab--model" / "blobs").iterdir()}
    assert not any(blob.startswith(machine.server.file(REPO, name).etag) for blob in blobs)
    machine.server.faults.clear()
    assert (machine.fetch().folder / name).read_bytes() == FILES[name]


def test_content_shorter_than_listed(machine: Machine, small: str) -> None:
    machine.server.shorten(WEIGHTS, to=100)
    machine.fetch().fails(WEIGHTS, REPO, "has less", "mirror")


def test_a_server_that_lists_no_hashes(machine: Machine, small: str) -> None:
    machine.server.sizes_listed = False
    assert contents(machine.fetch().folder) == {name: FILES[name] for name in NEEDED}


# ---------------------------------------------------------------- disk space


def test_too_little_disk_is_an_error_before_the_first_byte(machine: Machine, server: HubServer) -> None:
    server.add_repo(REPO, {**FILES, WEIGHTS: bytes(700_000)})
    server.add_repo("lab/base", {**FILES, WEIGHTS: bytes(1_400_000)})
    disk = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 8, {})"
    both: list[tuple[list[object], dict[str, object]]] = [([REPO], {}), (["lab/base"], {})]
    # Enough for each alone, not for both.
    outcome = machine.fetch_all(both, before=disk.format(2_000_000))
    said = ["2.1 MB are to be downloaded for qscorer", "lab/model: 700", "lab/base: 1.4 MB"]
    outcome.fails(*said, "2.0 MB free", str(machine.cache), "HF_HOME", "cache_dir", "folders")
    assert [request for request in server.requests if "/resolve/" in request.path] == []
    assert not machine.cache.exists()
    assert machine.fetch_all(both, before=disk.format(2_300_000)).error is None
    # Nothing is missing any more, so a full disk does not matter.
    assert machine.fetch_all(both, before=disk.format(0)).error is None


@pytest.mark.parametrize("limit", ["file size limit", "small file system"])
def test_a_disk_that_fills_up_is_said_and_resumed(machine: Machine, big: str, limit: str, tmp_path: Path) -> None:
    limit_bytes = CHUNK + 2_000_000
    other_use = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 0, 9**12)"
    if limit == "file size limit":
        resource = pytest.importorskip("resource", reason="no resource limits on this system")
        both = (limit_bytes, resource.RLIM_INFINITY)
        outcome = machine.fetch(before=f"import resource; resource.setrlimit(1, {both})")
    else:
        machine.cache.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={limit_bytes}", "tmpfs", str(machine.cache)]
        if not sys.platform.startswith("linux") or subprocess.run(mount).returncode != 0:
            pytest.skip("may not mount a small file system here (needs root)")
        try:
            outcome = machine.fetch(before=other_use)
            partial = [path.read_bytes() for path in machine.partial_files()]
        finally:
            subprocess.run(["umount", str(machine.cache)], check=True)
        assert len(partial) == 1 and len(partial[0]) >= CHUNK and BIG.startswith(partial[0])
    outcome.fails("disk is full", WEIGHTS, str(machine.cache), "Free some space", "HF_HOME")
    assert (machine.fetch().folder / WEIGHTS).read_bytes() == BIG
    if limit == "file size limit":
        assert machine.server.contents_of(WEIGHTS)[-1].range is not None


def test_cache_folder_that_cannot_be_read(machine: Machine, small: str) -> None:
    machine.fetch()
    # Not even root is refused by permissions, so the refusal is made up.
    refuse = """
from pathlib import Path
stat = Path.stat
def refused(path, **kwargs):
    if path.name == "model.safetensors":
        raise PermissionError(13, "Permission denied", str(path))
    return stat(path, **kwargs)
Path.stat = refused
"""
    machine.fetch(before=refuse).fails("cannot be read and written", "Permission denied", "HF_HOME")


def test_a_complete_cache_need_not_be_writable(machine: Machine, small: str) -> None:
    folder = machine.fetch().folder
    notes = folder.parent.parent / "pyiqa-qscorer"
    for note in notes.iterdir():
        note.unlink()
    notes.rmdir()
    notes.touch()  # a file in the way: not even root can write the note now
    assert machine.fetch().folder == folder


def test_without_symlinks_there_is_one_copy(machine: Machine, small: str) -> None:
    probe = "import huggingface_hub.file_download as f; f.are_symlinks_supported = lambda _=None: False"
    outcome = machine.fetch(before=f"{probe}; hub.are_symlinks_supported = f.are_symlinks_supported")
    assert contents(outcome.folder) == {name: FILES[name] for name in NEEDED}
    assert not any(path.is_symlink() for path in outcome.folder.iterdir())
    assert list((outcome.folder.parent.parent / "blobs").iterdir()) == []
    assert machine.offline().folder == outcome.folder


def test_cache_folder_that_cannot_be_written(machine: Machine, small: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    outcome = machine.fetch(cache_dir=str(tmp_path / "file" / "cache"))
    outcome.fails("cannot be read and written", str(tmp_path / "file" / "cache"), "HF_HOME")


def test_a_large_download_is_announced_to_whoever_uses_the_library(machine: Machine, small: str) -> None:
    outcome = machine.fetch(before="hub.LARGE_DOWNLOAD = 1000")
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("Downloading")]
    for said in ("8.7 kB for qscorer", "lab/model", str(machine.cache), "free", "resumes"):
        assert said in line


# ---------------------------------------------------------------- offline


def test_offline_and_not_cached(machine: Machine, small: str) -> None:
    said = [REPO, "not in the cache", str(machine.cache), "HF_HUB_OFFLINE=1", "local folder"]
    machine.offline().fails(*said)
    machine.fetch(local_files_only=True).fails("not in the cache", "local_files_only is set")
    assert machine.server.requests == []


@pytest.mark.parametrize("kind", ["sharded", "single", "lora"])
def test_snapshot_of_another_program_is_judged_by_its_structure(machine: Machine, server: HubServer, kind: str) -> None:
    shards = [f"pytorch_model-{number}-of-3.bin" for number in (1, 2, 3)]
    index = {"weight_map": {f"layer{name}": name for name in shards}}
    index_of_shards = {"pytorch_model.bin.index.json": json.dumps(index).encode()}
    lora = ["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"]
    names, lost = {
        "sharded": (shards, shards[1]),
        "single": ([WEIGHTS], WEIGHTS),
        "lora": (lora, "non_lora_trainables.bin"),
    }[kind]
    files = {"config.json": b"{}", **{name: name.encode() for name in names}}
    server.add_repo(REPO, files, extra=index_of_shards if kind == "sharded" else None)
    # As after `hf download`, which leaves no list of ours.
    env = server.environment(machine.home)
    download = f"import huggingface_hub; huggingface_hub.snapshot_download({REPO!r})"
    subprocess.run([sys.executable, "-c", download], env=env, check=True, capture_output=True)
    folder = machine.offline().folder
    os.remove(folder / lost)
    machine.offline().fails("only partly in the cache", lost)


# ---------------------------------------------------------------- what a checkpoint argument means


def test_local_or_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lab" / "here").mkdir(parents=True)
    (tmp_path / "file.bin").touch()
    for local in ("lab/here", "lab", "./lab", str(tmp_path), tmp_path / "lab", "~/lab"):
        assert hub.is_local(local)
    for repo_id in ("lab/elsewhere", BASE_REPO, LORA_REPO):
        assert not hub.is_local(repo_id)
    for missing in ("./no", "../no/no", "/no/such", "~/no", "a/b/c", Path("no/such"), "no\\such"):
        with pytest.raises(CheckpointError, match=r"no such folder.*'owner/name'"):
            hub.is_local(missing)
    for neither in ("qscorer", "", "a b/c", "owner/", "https://huggingface.co"):
        with pytest.raises(CheckpointError, match=r"neither an existing folder nor|no such folder"):
            hub.is_local(neither)
    with pytest.raises(CheckpointError, match=r"base='file\.bin' is a file"):
        hub.is_local("file.bin", argument="base")


def test_resolve_local_folder(tmp_path: Path) -> None:
    assert hub.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"'v1' was given for base=.*no revisions"):
        hub.resolve(tmp_path, "v1", argument="base")
    with pytest.raises(CheckpointError, match="repo_id='qscorer' is neither"):
        hub.plan("qscorer")


@pytest.mark.parametrize(
    ("names", "skipped"),
    [
        # the published base: unpadded shard numbers, one index
        (
            ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.model"]
            + ["tokenizer_config.json", "special_tokens_map.json", "pytorch_model.bin.index.json"]
            + [f"pytorch_model-{number}-of-33.bin" for number in range(1, 34)],
            ["README.md", ".gitattributes", "training_args.bin", "optimizer.pt", "demo.png"],
        ),
        # the published LoRA
        (
            ["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin", "config.json"],
            ["README.md", "trainer_state.json", "checkpoint-10/adapter_model.bin", "rng_state.pth"],
        ),
        # both formats: the safetensors alone, with their index
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "config.json",
                "adapter_model.safetensors",
            ],
            ["pytorch_model.bin", "adapter_model.bin", "onnx/model.onnx", "model.onnx", "a.py"],
        ),
        # incomplete safetensors do not displace complete .bin weights
        (
            ["pytorch_model.bin", "config.json", "tokenizer.json", "added_tokens.json"],
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.txt"],
        ),
        (["model.safetensors", "config.json"], ["model-00001-of-00001.safetensors"]),
        (["model-00002-of-00003.safetensors", "model.safetensors.index.json"], ["README.md"]),
        ([], ["README.md", "notes.json"]),
    ],
)
def test_weight_files(names: list[str], skipped: list[str]) -> None:
    assert sorted(hub.weight_files([*skipped, *names])) == sorted(names)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (26_214_400, "26.2 MB"), (16_416_780_290, "16.4 GB")],
)
def test_readable_size(size: int, text: str) -> None:
    assert hub.readable_size(size) == text
