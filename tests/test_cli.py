"""`score` and the commands around checkpoints: what is printed, exit codes, and that no finished score is ever lost."""

import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import TESTS, Result, full_disk, program, wait_for_lines
from fake_metric import FakeMetric, use
from PIL import Image
from rich.console import Console

from pyiqa_qscorer import __version__
from pyiqa_qscorer import scorer as scoring
from pyiqa_qscorer.cli import app as cli
from pyiqa_qscorer.cli import console as cli_output
from pyiqa_qscorer.scorer import Scorer

REAL_METRIC = scoring.build_metric
PROGRAM = [sys.executable, str(TESTS / "fake_metric.py")]
ALL = [f"photos/{level}.png" for level in range(8)]


@pytest.fixture(autouse=True)
def quick_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "build_metric", use)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight pictures, from dark to bright; the folder above is the working folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 80, (24, 32, 3), dtype=np.uint8)
    for level in range(8):
        Image.fromarray(noise + np.uint8(20 * level)).save(folder / f"{level}.png")
    monkeypatch.chdir(tmp_path)
    return folder


def paths(result: Result) -> list[str]:
    return [line.split("\t")[1] for line in result.out.splitlines()]


def test_in_a_pipe_lines_of_score_and_path(photos: Path) -> None:
    result = Result("score", "photos")
    assert result.code == 0 and paths(result) == ALL
    scores = [float(line.split("\t")[0]) for line in result.out.splitlines()]
    assert scores == pytest.approx(Scorer(FakeMetric()).score(ALL).tolist(), abs=1e-6)
    assert "8 images scored, mean 2." in result.err and "images/s" in result.err
    result = Result("score", "photos/1.png", "photos", "./photos/1.png")
    assert len(paths(result)) == 8 and "2 images named twice: scored once" in result.err
    failed = Result("score", "gone.png")
    assert failed.code == 1 and failed.out == "" and "0 images scored, 1 failed\n" in failed.err


def test_a_line_break_in_a_name_forges_no_line(photos: Path) -> None:
    names = ["1.png\n9.999\t0.png", "a\rb.png", "a\u2028b.png", "back\\slash.png", "\udce9.png"]
    for name in names:
        (photos / name).write_bytes((photos / "5.png").read_bytes())
    lines = Result("score", *(f"photos/{name}" for name in names)).out_bytes.split(b"\n")
    shown = [b"1.png\\n9.999\t0.png", b"a\\rb.png", b"a\\u2028b.png", b"back\\slash.png", b"\xe9.png"]
    assert [line.partition(b"\t")[2] for line in lines] == [*(b"photos/" + name for name in shown), b""]


def test_the_worst_only(photos: Path) -> None:
    (photos / "broken.png").write_bytes(b"")
    for table in ([], ["-o", "s.csv"], ["-o", "s.csv", "--resume"]):
        result = Result("score", "photos", "--worst", "3", *table)
        assert paths(result) == ALL[:3] and "8 images scored, 1 failed" in result.err and result.code == 1
    assert len(Path("s.csv").read_text().splitlines()) == 10


def test_a_list_of_inputs_on_standard_input(photos: Path) -> None:
    for name in ("a b.png", "a\nb.png"):
        (photos / name).write_bytes((photos / "7.png").read_bytes())
    result = Result("score", "photos/3.png", "-", stdin=b"photos/1.png\r\n\nphotos/a b.png\nphotos/[67].png\nx.png")
    assert paths(result) == [f"photos/{name}.png" for name in ("3", "1", "a b", "6", "7")]
    assert "failed x.png" in result.err
    assert len(Result("score", "-", stdin=b"photos/a\nb.png\0photos/1.png\0").out.splitlines()) == 2
    empty = Result("score", "-", stdin=b"\n")
    assert empty.code == 2 and "nothing to score" in empty.err


def test_in_a_terminal_a_table_best_first(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, highlight=False, color_system=None)
    monkeypatch.setattr(cli_output, "out", console)
    Image.open(photos / "3.png").save(photos / "a [bold]name[red]\x1b[2J.png")
    assert Result("score", "photos", "no-clamp.png").code == 1
    header, *rows = screen.getvalue().splitlines()
    assert header.split() == ["score", "0", "5", "size", "image"]
    assert len(rows) == 9 and all(len(row) <= 80 for row in rows)
    scores = [float(row.split()[0]) for row in rows]
    assert scores == sorted(scores, reverse=True) and rows[0].split()[2:] == ["32x24", "photos/7.png"]
    assert any(row.rstrip().endswith(r"photos/a [bold]name[red]\x1b[2J.png") for row in rows)
    assert Result("score", "photos", "--worst", "2").code == 0
    assert [row.split()[-1] for row in screen.getvalue().splitlines()[11:]] == ALL[:2]
    monkeypatch.setattr(cli_output, "LONG_TABLE", 8)
    assert "--worst N shows the lowest scores only" in Result("score", "photos").err


def test_failed_images_go_to_stderr(photos: Path) -> None:
    (photos / "broken.png").write_bytes((photos / "0.png").read_bytes()[:300])
    result = Result("score", "photos", "gone.png", "-o", "scores.csv")
    assert result.code == 1 and result.out == ""
    assert re.search(r"^failed photos/broken\.png: .*truncated", result.err, re.MULTILINE)
    assert re.search(r"^failed gone\.png: .*no such file", result.err, re.MULTILINE)
    assert "8 images scored, 2 failed" in result.err and "Table: scores.csv" in result.err
    assert len(Path("scores.csv").read_text().splitlines()) == 11
    missing = [f"{number}.png" for number in range(25)]
    result = Result("score", *missing, "-o", "missing.csv")
    assert result.err.count("failed ") == 20 and "and 5 more: column 'error' of the table" in result.err
    assert Result("score", *missing).err.count("failed ") == 25


def test_resume_and_overwrite(photos: Path) -> None:
    table = ["-o", "s.csv"]
    assert Result("score", "photos/[0-4].png", *table).code == 0
    refused = Result("score", "photos", *table)
    assert refused.code == 2 and refused.err == "error: s.csv exists: --resume adds to it, --overwrite replaces it\n"
    resumed = Result("score", "photos", *table, "--resume")
    assert resumed.code == 0 and "5 images of 8 scored before" in resumed.err and "8 images scored" in resumed.err
    again = Result("score", "photos", *table, "--resume")
    assert again.code == 0 and "8 images scored" in again.err and "images/s" not in again.err
    other = Result("score", "photos", *table, "--resume", "--prompt", "training")
    assert other.code == 2 and "another checkpoint or other options" in other.err
    assert Result("score", "photos", *table, "--overwrite", "--prompt", "training").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["photos", "--metric", "qscorrer"], "no metric 'qscorrer'; did you mean 'qscorer'"),
        (["https://example.org/a.png"], "URLs are not fetched"),
        (["photos/*.gif"], "no image file matches the pattern 'photos/*.gif'"),
        (["photos", "-o", "scores.xls"], "must end in .csv, .jsonl, .parquet"),
        (["photos", "--resume"], "--resume and --overwrite go with --output"),
        (["photos", "-o", "s.csv", "--resume", "--overwrite"], "exclude each other"),
        (["photos", "--device", "gpu"], "device must be like 'cpu'"),
        (["photos", "--device", "meta"], "device 'meta' cannot be used here"),
        (["photos", "-o", "/dev/null/s.csv"], "the folder of the output does not exist"),
        (["photos", "--batch-size", "0"], "batch-size"),
        (["photos", "--colour", "red"], "No such option"),
        ([], "Usage: pyiqa-qscorer score"),
    ],
)
def test_wrong_usage(photos: Path, arguments: list[str], words: str) -> None:
    result = Result("score", *arguments)
    assert words in " ".join((result.err + result.out).split()) and result.code == 2
    assert "Traceback" not in result.err and list(photos.parent.iterdir()) == [photos]


def test_tracebacks_are_for_debug_and_for_bugs(monkeypatch, capsys) -> None:
    result = Result("score", "https://example.org/a.png", "--debug")
    assert result.code == 2 and result.err.startswith("Traceback (most recent call last)")
    assert "URLs are not fetched" in result.err.splitlines()[-1]

    def wrong(cache_dir: str | None) -> None:
        raise RuntimeError("not foreseen")

    monkeypatch.setattr("pyiqa_qscorer.cli.doctor.examine", wrong)
    monkeypatch.setattr(sys, "argv", ["pyiqa-qscorer", "doctor"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 70  # not taken for failed images
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)") and said.endswith("RuntimeError: not foreseen\n")


@pytest.mark.parametrize(
    ("arguments", "module", "extra", "later"),
    [
        (["benchmark", "-m", "piqe", "-d", "koniq10k"], "jinja2", "benchmark", "evaluation.leaderboard_report"),
        (["errors", "--mos", "labels.csv"], "matplotlib", "analysis", "analysis.study"),
        (["errors", "--mos", "l.csv", "--data", "d", "--checkpoint", "c"], "yaml", "analysis", "analysis.study"),
        (["render", "mini.yaml"], "av", "train", "synthetic.rendering"),
        (["serve"], "fastapi", "serve", "serving.web"),
        (["demo"], "gradio", "demo", "serving.drop_page"),
    ],
)
def test_a_missing_extra_is_said_before_anything_is_imported(monkeypatch, arguments, module, extra, later) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else found(name, *rest))
    monkeypatch.setitem(sys.modules, f"pyiqa_qscorer.{later}", None)  # importing it would be an ImportError
    result = Result(*arguments)
    assert result.code == 2
    assert result.err == f'error: this command needs {module}: pip install "pyiqa-qscorer[{extra}]"\n'


def test_options_are_passed_on(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def build(name: str, options: dict, device: object) -> FakeMetric:
        given[name] = {option: value for option, value in options.items() if value is not None}
        return FakeMetric()

    monkeypatch.setattr(scoring, "build_metric", build)
    flags = {"checkpoint": "c", "base": "b", "revision": "r", "base_revision": "br", "dtype": "float32"}
    flags |= {"prompt": "evaluation", "attn_implementation": "eager", "cache_dir": "d"}
    typed = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    arguments = ["score", "photos", "-m", "qscorer_4bit", "--no-clamp", "--local-files-only", *typed]
    assert Result(*arguments, "--batch-size", "3", "--workers", "1", "--device", "cpu").code == 0
    assert Result("score", "photos").code == Result("score", "photos", "--checkpoint", "c").code == 0
    four_bit = flags | {"clamp": False, "local_files_only": True}
    assert given == {"qscorer_4bit": four_bit, "qscorer-mini": {}, "qscorer": {"checkpoint": "c"}}


def test_a_stopped_run_resumes_to_the_same_table(photos: Path) -> None:
    for number in range(60):
        Image.new("RGB", (20, 20 + number), (number, 2 * number, 99)).save(photos / f"more{number:02}.png")
    (photos / "broken.png").write_bytes(b"\x89PNG")
    output, expected, partial = Path("scores.csv"), Path("expected.csv"), Path("scores.csv.partial.jsonl")
    assert Result("score", "photos", "-o", expected).code == 1
    command = [*PROGRAM, "score", "photos", "-o", str(output), "--batch-size", "4", "--resume"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, **program(FAKE_SECONDS_PER_IMAGE=0.1))
    wait_for_lines(partial, 12, run)
    refused = Result("score", "photos/1.png", "-o", output)  # before it loads its model
    assert refused.code == 2 and refused.err.startswith("error: another run is writing scores.csv.partial.jsonl")
    run.send_signal(signal.SIGINT)
    message = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and re.search(r"Interrupted after \d+ of 69 images", message)
    assert "scores.csv.partial.jsonl. Repeat the command with --resume" in message
    assert "Traceback" not in message and not output.exists()
    with partial.open("ab") as file:  # as a kill leaves it; test_hostile_files.py kills
        file.write(b'{"path": "torn')
    scored = partial.read_bytes().count(b"\n")
    result = Result("score", "photos", "-o", output, "--resume")
    assert result.code == 1 and f"{scored - 1} images of 69 scored before" in result.err  # not the broken one
    assert output.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in photos.parent.iterdir()) == ["expected.csv", "photos", "scores.csv"]


def test_full_disk_keeps_finished_rows(photos: Path) -> None:
    with full_disk(1000):
        run = Result("score", "photos", "-o", "scores.csv")
    assert run.code == 2 and "Traceback" not in run.err
    assert re.search(r"error: cannot write scores\.csv\.partial\.jsonl: File too large\. \d finished rows", run.err)
    rows = [json.loads(line) for line in Path("scores.csv.partial.jsonl").read_bytes().splitlines()]
    assert [row["path"] for row in rows] == ALL[: len(rows)] and rows
    resumed = Result("score", "photos", "-o", "scores.csv", "--resume")
    assert resumed.code == 0 and f"{len(rows)} images of 8 scored before" in resumed.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["score", "photos"], ["score", "photos", "--worst", "1"], ["doctor", "--json"]])
def test_standard_output_that_is_full(photos, monkeypatch, capsys, arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["pyiqa-qscorer", *arguments])
    with open("/dev/full", "w") as full, pytest.raises(SystemExit) as end:
        monkeypatch.setattr(sys, "stdout", full)
        cli.main()
    message = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in message and "Exception" not in message
    assert "error: standard output cannot be written: No space left on device" in message


def test_a_closed_pipe_is_an_error(photos: Path) -> None:
    command = [*PROGRAM, "score", "photos", "--batch-size", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = subprocess.Popen(command, **pipes, **program(FAKE_SECONDS_PER_IMAGE=0.05))
    assert run.stdout is not None and run.stdout.readline() and run.stderr is not None
    run.stdout.close()
    message = run.stderr.read()
    assert run.wait(timeout=60) == 2 and "Traceback" not in message and "Exception" not in message
    assert "error: standard output cannot be written: Broken pipe" in message


def test_help_and_version_are_quick() -> None:
    code = """
import sys
from pyiqa_qscorer.cli.app import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "pyiqa", "numpy", "PIL", "huggingface_hub"} & set(sys.modules)
    assert not heavy, heavy
"""
    for arguments, words in ((["--version"], f"pyiqa-qscorer {__version__}"), (["score", "--help"], "--checkpoint")):
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, timeout=60, **program())
            seconds.append(time.monotonic() - started)
            assert run.returncode == 0 and words in run.stdout, run.stderr
        assert min(seconds) < 2  # 0.25 s alone; other tests may keep the machine busy
    bare = Result()
    assert all(command in bare.out + bare.err for command in ("score", "download", "merge", "doctor"))


def test_setup_errors_are_one_message(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "build_metric", REAL_METRIC)
    for arguments, words in (
        (["--checkpoint", "./nowhere"], "no such folder"),
        (["--checkpoint", "photos"], "none of the known checkpoint layouts"),
        (["--checkpoint", "photos", "--dtype", "float8"], "dtype must be one of"),
    ):
        result = Result("score", "photos", *arguments)
        assert result.code == 2 and "Traceback" not in result.err
        assert re.search(rf"^error: .*{words}", result.err, re.MULTILINE), result.err
