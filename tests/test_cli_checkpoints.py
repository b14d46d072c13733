"""`score`, `download` and `merge` with checkpoints, from folders and from the Hub."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TESTS, Result
from hub_server import BASE_REPO, LORA_REPO, serve_published_layout
from tiny_checkpoint import add_tokenizer, published_folders


def test_score_download_merge_with_a_real_checkpoint(tmp_path: Path, golden: Path) -> None:
    lora, base, _ = published_folders(tmp_path)
    summary = json.loads((golden / "lora_golden" / "summary.json").read_text())
    images, merged = sorted((golden / "images").glob("[a-k]_*.png")), tmp_path / "merged-here"
    source = ["--checkpoint", lora, "--base", base]
    fetched = Result("download", *source)
    assert fetched.code == 0 and fetched.out.splitlines() == [str(lora), str(base)]
    assert Result("merge", "-o", merged, *source).out == f"{merged}\n"
    for key, options in (("load_fp32_eager", source), ("merged_fp32_eager", ["--checkpoint", merged])):
        scored = Result("score", *images, *options, "--dtype", "float32", "--device", "cpu")
        scores = [float(line.split("\t")[0]) for line in scored.out.splitlines()]
        assert scored.code == 0 and scores == pytest.approx(summary[key]["score"], abs=1e-4)
    for output, more, words in (
        (merged, [], "empty folder"),
        ("/dev/null/folder", [], "error: [A-Z].*: /dev/null"),
        (tmp_path / "x", ["--layout", "nonsense"], ""),
    ):
        refused = Result("merge", "-o", output, *source, *more)
        assert refused.code == 2 and re.search(words, refused.err)


SESSION = """
import json, sys
from pyiqa_qscorer.cli.app import app
for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments)
    except SystemExit as end:
        print("exit", end.code, flush=True)
"""


def test_download_from_the_hub_then_score(tmp_path: Path, golden: Path) -> None:
    """The commands as the README has them, against a server that has tiny models under the published names."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    add_tokenizer(tokenizer)
    server, environment = serve_published_layout(tmp_path, golden, tokenizer / "tokenizer.model")
    scores = ["score", str(golden / "images" / "b_rgb_384x512.png"), "-m", "qscorer"]
    commands = [[*scores, "--local-files-only"], ["download"], ["download"]]
    commands += [[*scores, "--dtype", "float32", "--device", "cpu"], ["doctor", "--json"]]
    command, env = (
        [sys.executable, "-c", SESSION, json.dumps(commands)],
        environment | {"PYTHONPATH": str(TESTS.parent)},
    )
    with server:
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    not_there, first, second, scored, report = re.split(r"^exit [\d]+\n", run.stdout, flags=re.MULTILINE)[:5]
    assert re.findall(r"^exit (\d+)", run.stdout, re.MULTILINE)[:4] == ["2", "0", "0", "0"], run.stderr
    assert not_there == "" and "error: '2kxx/Qscorer_lora_5_1' (revision 'main') is not in the cache" in run.stderr
    folders = [Path(line) for line in first.splitlines()]
    assert first == second and len(folders) == 2 and all((folder / "config.json").exists() for folder in folders)
    assert re.search(r"2kxx/Qscorer_lora_5_1: .* MB to download", run.stderr)
    assert "2kxx/Qscorer_lora_5_1: complete" in run.stderr and "Traceback" not in run.stderr
    assert float(scored.split("\t")[0]) == pytest.approx(0.495093, abs=1e-4)
    assert json.loads(report)["cache"]["complete"] == {name: True for name in (BASE_REPO, LORA_REPO)}
