"""Downloads that meet a fault: what is resumed, refused or deleted, and what is said about it."""

# ruff: noqa: F401, F811 (the fixtures come from `hub_machine`, and pytest passes them by name)

import subprocess
import sys
from pathlib import Path

import pytest
from commands import small_disk
from hub_machine import (
    BIG,
    CHUNK,
    FILES,
    NEEDED,
    REPO,
    WEIGHTS,
    Machine,
    big,
    contents,
    machine,
    server,
    small,
    wait_for,
)
from hub_server import TOKEN, HubServer


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_cut_connection_is_tried_again_in_the_same_call(machine: Machine, big: str, reset: bool) -> None:
    machine.server.cut(WEIGHTS, after=CHUNK + 5_000_000, reset=reset)
    assert (machine.fetch().folder / WEIGHTS).read_bytes() == BIG
    assert len(machine.server.contents_of(WEIGHTS)) == 2 and not machine.partial_files()


@pytest.mark.parametrize("end", ["error", "kill"])
def test_the_next_run_fetches_what_is_not_complete(machine: Machine, big: str, end: str) -> None:
    if end == "kill":
        machine.server.fault(WEIGHTS, "hang", CHUNK + 1, 1)
        process = machine.start([([REPO], {})], "", {})
        others = NEEDED - {WEIGHTS}  # are fetched at the same time, and must be complete
        wait_for(lambda: others <= {path.name for path in machine.cache.glob("models--*/snapshots/*/*")})
        wait_for(lambda: [path.stat().st_size for path in machine.partial_files()] == [CHUNK])
        process.kill()
        process.communicate()
    else:
        machine.server.cut(WEIGHTS, after=100, times=None)
        message = machine.fetch().fails(
            WEIGHTS, REPO, "did not deliver", "1 of 3 files are missing", "Try again", "HF_ENDPOINT"
        )
        assert "http" not in message.replace(machine.server.endpoint, "")  # no address with a signature
        assert 2 < len(machine.server.contents_of(WEIGHTS)) < 40  # bounded
        assert not machine.partial_files()
    machine.offline().fails("not in the cache", "complete files are kept")
    machine.server.faults.clear()
    machine.server.requests.clear()
    assert contents(machine.fetch().folder) == {name: {**FILES, WEIGHTS: BIG}[name] for name in NEEDED}
    assert {Path(request.path).name for request in machine.server.requests if request.sent} & NEEDED == {WEIGHTS}


@pytest.mark.parametrize("status", [500, 429])
def test_a_busy_server_is_asked_again(machine: Machine, small: str, status: int) -> None:
    machine.server.fail(WEIGHTS, status)
    assert (machine.fetch().folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_damaged_and_unwritable_caches(machine: Machine, small: str) -> None:
    weights = machine.fetch().folder / WEIGHTS
    weights.resolve().write_bytes(b"short")
    machine.offline().fails("only partly in the cache", WEIGHTS)
    assert (machine.fetch().folder / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    folder = machine.fetch().folder
    (folder.parents[1] / "refs" / "v1").mkdir()  # in the way: not even root can write there what "v1" means
    machine.server.repos[REPO].refs["v1"] = small
    assert machine.fetch(REPO, "v1").folder == folder


def test_wrong_names_and_servers_that_are_no_hub(machine: Machine, small: str) -> None:
    server = machine.server
    machine.fetch("lab/typo").fails("'lab/typo' was not found", server.endpoint, "spelling")
    machine.fetch(REPO, "v9").fails(f"{REPO!r} has no revision 'v9'", "branch", "tag")
    server.fail(WEIGHTS, 403, times=None)
    machine.fetch().fails("gated or private", REPO, "HF_TOKEN")
    server.add_repo("lab/none", {"README.md": b"#", "data.csv": b"1"})
    outcome = machine.fetch("lab/none")
    assert outcome.error == "CheckpointError"
    assert "README.md, data.csv" in outcome.message and "config.json" in outcome.message
    web_page = {"HF_ENDPOINT": server.cdn}
    machine.fetch("lab/new", env=web_page).fails(f"Could not ask {server.cdn}", "HF_ENDPOINT")
    server.close()
    machine.fetch("lab/new").fails("lab/new", f"Could not ask {server.endpoint}", "connection", "mirror", "folder")


def test_gated_repository(machine: Machine, server: HubServer) -> None:
    server.add_repo("lab/open", FILES)
    server.add_repo(REPO, FILES, gated=True)
    both: list[tuple[list[object], dict[str, object]]] = [(["lab/open"], {}), ([REPO], {})]
    outcome = machine.fetch_all(both)
    outcome.fails(REPO, "gated", "accept its licence", "HF_TOKEN", f"{server.endpoint}/{REPO}")
    assert not any("/resolve/" in request.path for request in server.requests)  # of either
    machine.fetch(env={"HF_TOKEN": "hf_wrong"}).fails("the token is wrong", "unset a wrong one")
    assert machine.fetch_all(both, env={"HF_TOKEN": TOKEN}).error is None
    to_cdn = [request for request in server.requests if request.host == "cdn"]
    assert to_cdn and not any(request.authorized for request in to_cdn)  # the token stays at home


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_corrupted_content_never_enters_the_cache(machine: Machine, small: str, name: str) -> None:
    machine.server.fault(name, "corrupt")
    message = machine.fetch().fails(name, REPO, "damaged", "hash", "deleted", "Try again")
    assert machine.server.endpoint not in message  # names the repository, not an internal address
    blobs = {path.name for path in (machine.cache / "models--lab--model" / "blobs").iterdir()}
    assert not any(blob.startswith(machine.server.file(REPO, name).etag) for blob in blobs)
    machine.server.faults.clear()
    assert (machine.fetch().folder / name).read_bytes() == FILES[name]


def test_content_shorter_than_listed_and_a_server_that_lists_no_hashes(machine: Machine, small: str) -> None:
    machine.server.fault(WEIGHTS, "short", 100)
    machine.fetch().fails(WEIGHTS, REPO, "8000 but has size 100", "another mirror")
    machine.server.faults.clear()
    machine.server.sizes_listed = False
    assert contents(machine.fetch().folder) == {name: FILES[name] for name in NEEDED}


def test_too_little_disk_is_an_error_before_the_first_byte(machine: Machine, server: HubServer) -> None:
    server.add_repo(REPO, {**FILES, WEIGHTS: bytes(700_000)})
    server.add_repo("lab/base", {**FILES, WEIGHTS: bytes(1_400_000)})
    disk = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 8, {})"
    both: list[tuple[list[object], dict[str, object]]] = [([REPO], {}), (["lab/base"], {})]
    # Enough for each alone, not for both.
    outcome = machine.fetch_all(both, before=disk.format(2_000_000))
    said = ["2.1 MB are to be downloaded (lab/model", "lab/model: 700", "lab/base: 1.4 MB"]
    outcome.fails(*said, "2.0 MB free", str(machine.cache), "HF_HOME", "cache_dir", "folders")
    assert [request for request in server.requests if "/resolve/" in request.path] == []
    assert not machine.cache.exists() and machine.fetch_all(both, before=disk.format(2_300_000)).error is None
    # Nothing is missing any more, so a full disk does not matter.
    assert machine.fetch_all(both, before=disk.format(0)).error is None


@pytest.mark.parametrize("limit", ["file size limit", "small file system"])
def test_a_disk_that_fills_up_is_said(machine: Machine, big: str, limit: str, tmp_path: Path) -> None:
    limit_bytes = CHUNK + 2_000_000
    other_use = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 0, 9**12)"
    if limit == "file size limit":
        resource = pytest.importorskip("resource", reason="no resource limits on this system")
        both = (limit_bytes, resource.RLIM_INFINITY)
        outcome = machine.fetch(before=f"import resource; resource.setrlimit(1, {both})")
    else:
        machine.cache.mkdir(parents=True)
        with small_disk(machine.cache, str(limit_bytes)):
            outcome = machine.fetch(before=other_use)
    outcome.fails("disk is full", WEIGHTS, str(machine.cache), "Free some space", "HF_HOME")
    assert (machine.fetch().folder / WEIGHTS).read_bytes() == BIG


def test_cache_folder_that_cannot_be_read_or_written(machine: Machine, small: str, tmp_path: Path) -> None:
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
    (tmp_path / "file").write_bytes(b"")
    outcome = machine.fetch(cache_dir=str(tmp_path / "file" / "cache"))
    outcome.fails("cannot be read and written", str(tmp_path / "file" / "cache"), "HF_HOME")


def test_a_large_download_is_announced_to_whoever_uses_the_library(machine: Machine, small: str) -> None:
    outcome = machine.fetch(before="hub.LARGE_DOWNLOAD = 1000")
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("Downloading")]
    for said in ("Downloading 8.7 kB (lab", "lab/model", str(machine.cache), "free", "complete files are kept"):
        assert said in line
