"""`doctor`: its facts, what it calls a problem, and how it prints."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from environments import REPOSITORY
from hub_server import HubServer
from typer.testing import CliRunner

from pyiqa_qscorer.cli import app as cli
from pyiqa_qscorer.cli import doctor
from pyiqa_qscorer.files import readable_size
from pyiqa_qscorer.registry import DEFAULT_METRIC, METRICS, PUBLISHED_BASE, PUBLISHED_CHECKPOINT
from pyiqa_qscorer.scorer import build_metric


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_report_of_this_machine(tmp_path: Path) -> None:
    before, facts = sorted(tmp_path.iterdir()), doctor.examine(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == before and facts["packages"]["pyiqa"] and facts["packages"]["torch"]
    assert facts["cpu_cores"] >= 1 and facts["memory"] > 10**8 and facts["free_memory"] <= facts["memory"]
    assert facts["cache"]["folder"] == str(tmp_path) and set(facts["cache"]["stored"].values()) == {0}
    printed = CliRunner().invoke(cli.app, ["doctor", "--cache-dir", str(tmp_path)])
    assert printed.exit_code == (1 if facts["problems"] else 0)
    for words in ("Installation", "transformers", "offline: HF_HUB_OFFLINE=1", "not there", *METRICS):
        assert words in printed.stdout
    as_json = json.loads(CliRunner().invoke(cli.app, ["doctor", "--json", "--cache-dir", str(tmp_path)]).stdout)
    assert as_json.keys() == facts.keys() and as_json["cache"] == facts["cache"] | {"free": as_json["cache"]["free"]}


@pytest.mark.parametrize(
    ("name", "text", "limited"),
    [
        ("memory.max", "1000000\n", True),
        ("memory/memory.limit_in_bytes", "1000000", True),
        ("memory.max", "max", False),
    ],
)
def test_memory_is_what_a_container_may_take(tmp_path: Path, name: str, text: str, limited: bool) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    total, free = doctor.memory(tmp_path)
    assert (total == 10**6 and free == 10**6) if limited else (total > 10**8 and free <= total)


def test_partial_downloads_are_counted_in_readable_sizes(tmp_path: Path) -> None:
    sizes = {0: "0 bytes", 999: "999 bytes", 1500: "1.5 kB", 26_214_400: "26.2 MB", 16_416_780_290: "16.4 GB"}
    assert {size: readable_size(size) for size in sizes} == sizes
    blobs = tmp_path / f"models--{PUBLISHED_BASE.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(bytes(1000))
    cache = doctor.examine_cache(str(tmp_path))
    assert cache["stored"] == {PUBLISHED_BASE: 1000, PUBLISHED_CHECKPOINT: 0}
    assert cache["complete"] == {PUBLISHED_BASE: False, PUBLISHED_CHECKPOINT: False}
    assert "incomplete, 1.0 kB" in CliRunner().invoke(cli.app, ["doctor", "--cache-dir", str(tmp_path)]).stdout


def test_whether_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "*")
    with HubServer() as server:
        monkeypatch.setattr(f"{constants}.ENDPOINT", server.endpoint)
        assert doctor.hub_state() == f"{server.endpoint} answers"
    assert doctor.hub_state().startswith(f"{server.endpoint} does not answer: ")
    monkeypatch.setattr(f"{constants}.ENDPOINT", "nonsense")
    assert doctor.hub_state() == "nonsense does not answer: unknown url type: 'nonsense'"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"problem": "E: x"}, "could not be added to pyiqa: E: x"),
        ({"switched_off": True}, "PYIQA_QSCORER_AUTOLOAD=0"),
        ({"startup_file_ran": False}, "start-up files were not read"),
        ({}, None),
    ],
)
def test_registration_problems(change: dict, words: str | None) -> None:
    sound = {"problem": None, "switched_off": False, "startup_file_ran": True}
    problems = doctor.registration_problems(dataclasses.replace(doctor.registration_state(), **(sound | change)))
    assert len(problems) == (words is not None) and (words is None or words in problems[0])


def test_requirements_and_broken_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["torch>=1", "pillow>=999", "no-such-package>=1", "no-such-extra; extra == 'test'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: required)
    too_old, absent = doctor.unmet_requirements()
    assert too_old.startswith("pillow>=999 is needed, found ") and "pip install -U 'pillow>=999'" in too_old
    assert absent == "no-such-package>=1 is not installed: pip install 'no-such-package>=1'"

    def fail(name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "import_module", fail)
    facts = doctor.examine()
    assert facts["cache"] is None and facts["devices"] is None
    assert "cannot be imported: OSError: libcudart.so.12" in facts["problems"][-1]
    printed = CliRunner().invoke(cli.app, ["doctor"])
    assert printed.exit_code == 1 and "problem: the package cannot be imported" in printed.stdout


def test_readme_tells_the_sizes_that_follow_from_the_key_list(golden: Path) -> None:
    counts = json.loads((golden / "full_size" / "counts.json").read_text())
    new_rows = 2 * 5 * 4096  # of the score tokens, in both vocabulary tables
    base = 2 * (counts["total_parameters"] - counts["deepmlp"] - new_rows)
    trained = sum(counts[part] for part in ("embed_tokens", "lm_head", "deepmlp", "vision_model", "visual_abstractor"))
    checkpoint = 4 * counts["lora_r128_trainable"] + 2 * trained
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"downloads (\d+) GB", text) == [f"{(base + checkpoint) / 1e9:.0f}"]
    mini = build_metric(DEFAULT_METRIC, {}, torch.device("cpu"))
    quantised = 7_549_747_200  # parameters of the decoder's linear layers
    others = 2 * (counts["total_parameters"] - quantised)
    expected = {
        DEFAULT_METRIC: readable_size(sum(t.nbytes for t in (*mini.parameters(), *mini.buffers()))),
        "qscorer": readable_size(2 * counts["total_parameters"]),
        "qscorer_8bit": f"about {readable_size(quantised + others)} (computed)",
        "qscorer_4bit": f"about {readable_size(0.5625 * quantised + others)} (computed)",  # 4 bit, a float32 per 64
    }
    for name, size in expected.items():
        assert f"| `{name}` | {size} |" in text
