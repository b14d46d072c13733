"""Downloads against a real server on loopback: which files, from where, and when nothing is asked."""

# ruff: noqa: F401, F811 (the fixtures come from `hub_machine`, and pytest passes them by name)

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_machine import FILES, NEEDED, REPO, WEIGHTS, Machine, contents, machine, server, small
from hub_server import BASE_REPO, LORA_REPO, HubServer, serve_published_layout

from pyiqa_qscorer.checkpoints import CheckpointSource
from pyiqa_qscorer.checkpoints.layouts import checkpoint_files
from pyiqa_qscorer.checkpoints.source import is_local
from pyiqa_qscorer.errors import CheckpointError


def test_first_download_takes_what_a_checkpoint_needs(machine: Machine, small: str) -> None:
    outcome = machine.fetch()
    assert contents(outcome.folder) == {name: FILES[name] for name in NEEDED}
    assert outcome.missing_bytes == [sum(len(FILES[name]) for name in NEEDED)]
    assert "Downloading 8." not in outcome.stderr  # small: nothing to announce
    # It is the ordinary Hub cache: huggingface_hub finds the file there by branch name.
    found = huggingface_hub.try_to_load_from_cache(REPO, WEIGHTS, cache_dir=machine.cache)
    assert found == str(outcome.folder / WEIGHTS)
    assert [repo.repo_id for repo in huggingface_hub.scan_cache_dir(machine.cache).repos] == [REPO]
    assert not machine.partial_files()


def test_repeated_runs_need_no_request_and_no_server(machine: Machine, small: str) -> None:
    folder = machine.fetch().folder
    assert machine.offline().folder == folder
    machine.server.requests.clear()
    assert machine.fetch(local_files_only=True).folder == folder
    assert machine.fetch(REPO, small).folder == folder  # a commit hash cannot change
    assert machine.server.requests == []
    assert machine.fetch().folder == folder  # a branch can: one question, no content
    assert [request.path for request in machine.server.requests] == [f"/api/models/{REPO}/revision/main"]
    folder = machine.fetch().folder
    machine.server.listing_status = 503
    assert machine.fetch().folder == folder
    machine.server.close()
    outcome = machine.fetch()
    assert outcome.folder == folder
    assert "Could not ask" in outcome.stderr and "Using the cached copy" in outcome.stderr


def test_revisions_mirrors_and_cache_folders(machine: Machine, small: str, tmp_path: Path) -> None:
    with HubServer() as mirror:
        mirror.add_repo(REPO, {**FILES, WEIGHTS: b"from the mirror"})
        folder = machine.fetch(env={"HF_ENDPOINT": mirror.endpoint}, cache_dir=str(tmp_path / "mine")).folder
    assert (folder / WEIGHTS).read_bytes() == b"from the mirror" and folder.is_relative_to(tmp_path / "mine")
    assert machine.server.requests == []
    folder = machine.fetch(env={"HF_HUB_CACHE": str(tmp_path / "other")}).folder
    assert folder.is_relative_to(tmp_path / "other") and not machine.cache.exists()
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
    machine.server.requests.clear()
    outcome = machine.fetch()
    assert outcome.missing_bytes == [0] and outcome.folder.name != small
    assert contents(outcome.folder) == {name: FILES[name] for name in NEEDED}
    assert not machine.server.contents_of(WEIGHTS)
    machine.server.add_repo(REPO, {**FILES, WEIGHTS: b"second"})
    machine.server.fail(WEIGHTS, 403)
    machine.fetch().fails(REPO)
    assert machine.offline().folder == outcome.folder  # an interrupted update leaves the old version usable


def test_published_layout(tmp_path: Path, golden: Path) -> None:
    server, env = serve_published_layout(tmp_path, golden)
    assert env["HF_ENDPOINT"] == server.endpoint
    with server:
        machine = Machine(server, tmp_path)
        lora, base = machine.fetch_all([([LORA_REPO], {}), ([BASE_REPO], {})]).folders
    expected = {path.name for path in (golden / "official_lora_layout").iterdir()} - {"README.md"}
    assert {path.name for path in lora.iterdir()} == expected and contents(base) == contents(golden / "base")


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


def test_local_or_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lab" / "here").mkdir(parents=True)
    (tmp_path / "file.bin").touch()
    for local in ("lab/here", "lab", "./lab", str(tmp_path), tmp_path / "lab", "~/lab"):
        assert is_local(local)
    for repo_id in ("lab/elsewhere", BASE_REPO, LORA_REPO):
        assert not is_local(repo_id)
    for missing in ("./no", "../no/no", "/no/such", "~/no", "a/b/c", Path("no/such"), "no\\such"):
        with pytest.raises(CheckpointError, match=r"no such folder.*'owner/name'"):
            is_local(missing)
    for neither in ("qscorer", "", "a b/c", "owner/", "https://huggingface.co"):
        with pytest.raises(CheckpointError, match=r"neither an existing folder nor|no such folder"):
            is_local(neither)
    with pytest.raises(CheckpointError, match=r"base='file\.bin' is a file"):
        is_local("file.bin", argument="base")


def test_local_folders_and_errors_that_name_their_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / "own"
    own.mkdir()
    assert CheckpointSource(str(own)).plan() == CheckpointSource("~/own").plan() == [own]
    with pytest.raises(CheckpointError, match=r"'v1' was given for checkpoint=.*no revisions"):
        CheckpointSource(own, revision="v1").plan()
    (own / "adapter_config.json").touch()
    for source, words in (
        (CheckpointSource(own, "./no"), r"base='\./no': no such folder"),
        (CheckpointSource(own, own, base_revision="v1"), r"'v1' was given for base="),
        (CheckpointSource("./no", own), r"checkpoint='\./no': no such folder"),
    ):
        with pytest.raises(CheckpointError, match=words):
            source.plan()


INDEX = "model.safetensors.index.json"
PUBLISHED_BASE = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.model"]
PUBLISHED_BASE += ["tokenizer_config.json", "special_tokens_map.json", "pytorch_model.bin.index.json"]
PUBLISHED_BASE += [f"pytorch_model-{number}-of-33.bin" for number in range(1, 34)]
PUBLISHED_LORA = ["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin", "config.json"]
SAFETENSORS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
SAFETENSORS += ["config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("names", "skipped"),
    [
        (PUBLISHED_BASE, ["README.md", ".gitattributes", "training_args.bin", "optimizer.pt", "demo.png"]),
        (PUBLISHED_LORA, ["README.md", "trainer_state.json", "checkpoint-10/adapter_model.bin", "rng_state.pth"]),
        (SAFETENSORS, ["pytorch_model.bin", "adapter_model.bin", "onnx/model.onnx", "model.onnx", "a.py"]),
        # Incomplete safetensors do not displace complete .bin weights.
        (
            ["pytorch_model.bin", "config.json", "tokenizer.json", "added_tokens.json"],
            ["model-00001-of-00002.safetensors", INDEX, "vocab.txt"],
        ),
        (["model.safetensors", "config.json"], ["model-00001-of-00001.safetensors"]),
        (["model-00002-of-00003.safetensors", INDEX], ["README.md"]),
        ([], ["README.md", "notes.json"]),
    ],
)
def test_checkpoint_files(names: list[str], skipped: list[str]) -> None:
    assert sorted(checkpoint_files([*skipped, *names])) == sorted(names)
