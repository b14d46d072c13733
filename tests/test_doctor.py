"""`doctor`: facts, verdicts for machines of all sizes, and how it prints."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import types
from pathlib import Path

import pytest
import torch
from environments import REPOSITORY
from typer.testing import CliRunner

from pyiqa_qscorer.cli import app as cli
from pyiqa_qscorer.cli import doctor_facts as doctor
from pyiqa_qscorer.cli.machine_facts import Cache, Device, Machine
from pyiqa_qscorer.cli.verdicts import DOWNLOAD_BYTES, OTHER_PARAMETERS, QUANTISED_PARAMETERS, judge, weight_bytes
from pyiqa_qscorer.files import readable_size
from pyiqa_qscorer.registry import DEFAULT_METRIC, METRICS, PUBLISHED_BASE, PUBLISHED_CHECKPOINT
from pyiqa_qscorer.scorer import build_metric

LARGE = Machine("Linux", 8, 64 * 10**9, 60 * 10**9, ())
H200 = Device("cuda:0", "NVIDIA H200", 150 * 10**9, 140 * 10**9)
SMALL_GPU = Device("cuda:0", "NVIDIA T4", 16 * 10**9, 15 * 10**9)


def cache(*complete: str, free: float = 100e9, stored: float = 0, offline: str | None = None) -> Cache:
    repos = (PUBLISHED_BASE, PUBLISHED_CHECKPOINT)
    return Cache(
        "/cache", int(free), {name: name in complete for name in repos}, dict.fromkeys(repos, int(stored)), offline
    )


COMPLETE = cache(PUBLISHED_BASE, PUBLISHED_CHECKPOINT)


@pytest.mark.parametrize(
    ("metric", "machine", "downloads", "state", "words"),
    [
        ("qscorer", LARGE, COMPLETE, "ready", "CPU in bfloat16, 18.4 GB of RAM"),
        ("qscorer", dataclasses.replace(LARGE, devices=(H200,)), COMPLETE, "ready", "cuda:0, 18.4 GB of its 150.0"),
        ("qscorer", dataclasses.replace(LARGE, devices=(SMALL_GPU,)), COMPLETE, "cannot run", "cuda:0 has 16.0"),
        ("qscorer_8bit", dataclasses.replace(LARGE, devices=(SMALL_GPU,)), COMPLETE, "ready", "10.9 GB of its 16.0"),
        ("qscorer_4bit", dataclasses.replace(LARGE, devices=(SMALL_GPU,)), COMPLETE, "ready", "7.6 GB of its 16.0"),
        ("qscorer_4bit", LARGE, COMPLETE, "ready", "CPU, without gradients, 24.0 GB of RAM to load, then 7.6 GB"),
        (
            "qscorer_8bit",
            dataclasses.replace(LARGE, memory=26 * 10**9),
            COMPLETE,
            "cannot run",
            "27.3 GB of RAM to load",
        ),
        ("qscorer", dataclasses.replace(LARGE, memory=8 * 10**9), COMPLETE, "cannot run", "18.4 GB of RAM to load"),
        ("qscorer", dataclasses.replace(LARGE, free_memory=9 * 10**9), COMPLETE, "ready", "only 9.0 GB is free"),
        ("qscorer", dataclasses.replace(LARGE, memory=None, free_memory=None), COMPLETE, "ready", "CPU"),
        ("qscorer", LARGE, cache(), "after download", "about 18.0 GB"),
        ("qscorer", LARGE, cache(PUBLISHED_BASE), "after download", "about 1.6 GB"),
        ("qscorer", LARGE, cache(PUBLISHED_CHECKPOINT, stored=16e9), "after download", "about 400.0 MB"),
        ("qscorer", LARGE, cache(free=9e9), "cannot run", "18.0 GB of disk .* set HF_HOME"),
        ("qscorer", LARGE, cache(offline="HF_HUB_OFFLINE=1 is set"), "cannot run", "HF_HUB_OFFLINE=1"),
    ],
)
def test_verdicts(metric: str, machine: Machine, downloads: Cache, state: str, words: str) -> None:
    if metric != "qscorer" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    verdict = judge(metric, machine, downloads)
    assert verdict.state == state
    assert re.search(words, verdict.reason), verdict.reason


def test_memory_of_the_published_model_follows_from_its_key_list(golden: Path) -> None:
    counts = json.loads((golden / "full_size" / "counts.json").read_text())
    assert counts["total_parameters"] == QUANTISED_PARAMETERS + OTHER_PARAMETERS
    assert weight_bytes("float16") == weight_bytes("auto") == 2 * counts["total_parameters"]
    assert weight_bytes("float32") == 4 * counts["total_parameters"]
    assert weight_bytes("4bit") < weight_bytes("8bit") < weight_bytes("float16")


def test_size_of_the_download_follows_from_the_key_list(golden: Path) -> None:
    counts = json.loads((golden / "full_size" / "counts.json").read_text())
    new_rows = 2 * 5 * 4096  # of the score tokens, in both vocabulary tables
    base = 2 * (counts["total_parameters"] - counts["deepmlp"] - new_rows)
    trained = sum(counts[part] for part in ("embed_tokens", "lm_head", "deepmlp", "vision_model", "visual_abstractor"))
    checkpoint = 4 * counts["lora_r128_trainable"] + 2 * trained
    expected = {PUBLISHED_BASE: base, PUBLISHED_CHECKPOINT: checkpoint}
    assert pytest.approx(expected, rel=0.01) == DOWNLOAD_BYTES


def test_readme_tells_the_same_sizes() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (download,) = re.findall(r"downloads (\d+) GB", text)
    assert download == f"{sum(DOWNLOAD_BYTES.values()) / 1e9:.0f}"
    table = text.split("## Which metric should I take?")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    memory = {name.strip("`"): re.sub(r"about | \(computed\)", "", cells[0]) for name, *cells in rows}
    expected = {name: readable_size(weight_bytes(metric.options["dtype"])) for name, metric in METRICS.items()}
    mini = build_metric(DEFAULT_METRIC, {}, torch.device("cpu"))
    expected[DEFAULT_METRIC] = readable_size(sum(t.nbytes for t in (*mini.parameters(), *mini.buffers())))
    assert memory == expected


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (26_214_400, "26.2 MB"), (16_416_780_290, "16.4 GB")],
)
def test_readable_size(size: int, text: str) -> None:
    assert readable_size(size) == text


def test_replaced_llama_parts_are_seen() -> None:
    class Own:
        def forward(self) -> None: ...

    Own.__module__ = Own.forward.__module__ = doctor.LLAMA_MODULE
    module = types.ModuleType(doctor.LLAMA_MODULE)
    module.LlamaAttention = module.LlamaModel = Own  # type: ignore[attr-defined]
    assert doctor.replaced_llama_parts(module) == ()
    assert doctor.replaced_llama_parts(None) == ()

    class Foreign(Own):
        def forward(self) -> None: ...

    module.LlamaAttention = Foreign  # type: ignore[attr-defined]
    assert doctor.replaced_llama_parts(module) == ("LlamaAttention",)
    Foreign.__module__ = doctor.LLAMA_MODULE
    assert doctor.replaced_llama_parts(module) == ("LlamaAttention.forward",)


def test_registration_problems() -> None:
    state = doctor.registration_state()
    sound = dataclasses.replace(state, problem=None, switched_off=False, startup_file_ran=True)
    assert doctor.registration_problems(sound) == []
    for change, words in (
        ({"problem": "E: x"}, "could not be added to pyiqa: E: x"),
        ({"switched_off": True}, "PYIQA_QSCORER_AUTOLOAD=0"),
        ({"startup_file_ran": False}, "start-up files were not read"),
    ):
        (problem,) = doctor.registration_problems(dataclasses.replace(sound, **change))
        assert words in problem


def test_requirements_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["torch>=1", "pillow>=999", "no-such-package>=1", "no-such-extra; extra == 'test'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: required)
    too_old, absent = doctor._unmet_requirements()
    assert too_old.startswith("pillow>=999 is needed, found ") and "pip install -U 'pillow>=999'" in too_old
    assert absent == "no-such-package>=1 is not installed: pip install 'no-such-package>=1'"


def test_a_broken_package_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "import_module", fail)
    report = doctor.examine()
    assert report.cache is None and report.verdicts == ()
    assert "cannot be imported: OSError: libcudart.so.12" in report.problems[-1]
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 1


def test_report_of_this_machine(tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    report = doctor.examine(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == before
    assert report.packages["pyiqa"] and report.packages["torch"]
    assert report.machine.cpu_cores >= 1
    assert report.machine.memory is None or report.machine.memory > 10**9
    assert [verdict.metric for verdict in report.verdicts] == list(METRICS)
    assert report.cache is not None and set(report.cache.stored.values()) == {0}
    if importlib.util.find_spec("pyiqa"):
        assert "LlamaAttention" in report.llama.pyiqa_replaces
        assert "archs/q_align/modeling_llama2.py" in report.llama.pyiqa_files

    printed = CliRunner().invoke(cli.app, ["doctor", "--cache-dir", str(tmp_path)])
    assert printed.exit_code == (1 if report.problems else 0)
    for words in ("Installation", "transformers", "Llama classes", "Hub cache", *METRICS):
        assert words in printed.stdout
    as_json = json.loads(CliRunner().invoke(cli.app, ["doctor", "--json", "--cache-dir", str(tmp_path)]).stdout)
    assert set(as_json) == {field.name for field in dataclasses.fields(doctor.Report)}
    assert as_json["cache"]["folder"] == str(tmp_path)


def test_partial_downloads_are_counted(tmp_path: Path) -> None:
    blobs = tmp_path / f"models--{PUBLISHED_BASE.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(bytes(1000))
    report = doctor.examine(str(tmp_path))
    assert report.cache is not None
    assert report.cache.stored == {PUBLISHED_BASE: 1000, PUBLISHED_CHECKPOINT: 0}
    assert report.cache.complete == {PUBLISHED_BASE: False, PUBLISHED_CHECKPOINT: False}
