"""`pyiqa-qscorer benchmark`: what the user types, runs that are stopped or multiplied, and pyiqa's own names."""

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_world import FakeMetrics, write_csv, write_dataset
from commands import Result, full_disk, program, wait_for_lines
from matplotlib.figure import Figure
from rich.console import Console
from tiny_checkpoint import published_folders

from pyiqa_qscorer.cli.benchmark import dataset_specs, metric_specs
from pyiqa_qscorer.data.score_rows import ScoreRow, read_rows, write_rows
from pyiqa_qscorer.errors import InputError, QScorerError
from pyiqa_qscorer.evaluation import leaderboard_report, runner
from pyiqa_qscorer.evaluation.leaderboard_report import terminal_tables
from pyiqa_qscorer.evaluation.results import read_leaderboard
from pyiqa_qscorer.evaluation.scoring import BenchmarkRow
from pyiqa_qscorer.report import print_tables

TESTS = Path(__file__).parent
PROGRAM = [sys.executable, str(TESTS / "benchmark_world.py")]
LEVELS = range(40, 220, 6)


def benchmark(*arguments: object) -> Result:
    return Result("benchmark", *arguments)


@pytest.fixture
def quick_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """And small pictures: what they show is in test_benchmark_report.py."""
    FakeMetrics().install(monkeypatch.setattr)
    monkeypatch.setattr(leaderboard_report, "scatter", lambda entry: Figure(figsize=(1, 1)))
    monkeypatch.setattr(leaderboard_report, "accuracy_against_cost", lambda entries: None)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`data/opinions.csv` with its images in `data/images`; the folder above is the working folder."""
    write_dataset(tmp_path / "data", LEVELS)
    monkeypatch.chdir(tmp_path)
    return Path("data/opinions.csv")


def rows(metric: str, output: str = "benchmark", dataset: str = "opinions") -> list[BenchmarkRow]:
    return read_rows(Path(output, "scores", dataset, f"{metric}.csv"), BenchmarkRow)


def scores(metric: str, output: str = "benchmark") -> list[tuple]:
    return [(row.path, row.score, row.error, row.mos, row.identity) for row in rows(metric, output)]


def test_labels_and_settings() -> None:
    given = ["mine.checkpoint=DIR", "mine.clamp=false", "mine.local-files-only=true"]
    found = [(one.label, one.name, one.options) for one in metric_specs(["mine=qscorer", "piqe"], given)]
    options = {"checkpoint": "DIR", "clamp": False, "local_files_only": True}
    assert found == [("mine", "qscorer", options), ("piqe", "piqe", {})]
    own, named = dataset_specs(["agiqa3k=x/y.csv", "koniq10k"], Path("i"), None, ["mos=m"], True)
    assert (own.label, own.csv, own.images, own.columns, own.lower_better) == (
        "agiqa3k", Path("x/y.csv"), Path("i"), {"mos": "m"}, True,
    )  # fmt: skip
    assert (named.label, named.name, named.csv, named.lower_better) == ("koniq10k", "koniq10k", None, False)
    for call, words in (
        (lambda: metric_specs([], []), "no metric"),
        (lambda: metric_specs(["piqe"], ["piqe=1"]), "METRIC.OPTION=VALUE"),
        (lambda: metric_specs(["piqe"], ["pique.x=1"]), "pique, which -m does not name"),
        (lambda: dataset_specs([], None, None, [], False), "no dataset"),
        (lambda: dataset_specs(["a.csv"], None, None, ["mos"], False), "ROLE=COLUMN"),
        (lambda: dataset_specs(["koniq10k"], None, None, [], True), "are for CSV files"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_split_and_phase_say_which_datasets_they_are_not_for(capsys: pytest.CaptureFixture[str]) -> None:
    own, named = dataset_specs(["my.csv", "koniq10k"], None, None, [], False, "3", "val")
    assert (named.split, named.phase, own.phase) == (3, "val", None)
    said = capsys.readouterr().err
    assert "--phase val is not used for my: it needs --columns split=COLUMN\n" in said
    assert "--split 3 is not used for my: it is for pyiqa's datasets" in said and "koniq10k" not in said
    given = (None, None, ["split=part"], False, None, "val")
    assert [spec.phase for spec in dataset_specs(["my.csv", "koniq10k"], *given)] == ["val", "val"]
    assert dataset_specs(["my.csv"], *given)[0].phase == "val" and capsys.readouterr().err == ""


def test_a_run_and_its_reports(quick_metrics: None, table: Path) -> None:
    result = benchmark("-m", "brightness", "-m", "darkness", "-d", table, "--images", "data/images")
    assert result.code == 0, result.err
    assert re.search(r"brightness +0\.9\d\d +0\.\d{3}, 0\.\d{3} .* 30 ", result.out)
    written = {path.name for path in Path("benchmark").iterdir()}
    assert written == {"scores", "leaderboard.csv", "leaderboard.md", "leaderboard.json", "report.html"}
    before = Path("benchmark/leaderboard.json").read_bytes()
    again = benchmark("-m", "brightness", "-m", "darkness", "-d", table, "--images", "data/images")
    assert again.code == 0 and "0 images to score, 30 scored before" in again.err
    Path("benchmark/leaderboard.json").unlink()
    assert benchmark("--report-only").code == 0
    kept = [json.loads(text)["entries"] for text in (before, Path("benchmark/leaderboard.json").read_bytes())]
    assert [one["agreement"] for one in kept[0]] == [one["agreement"] for one in kept[1]]


def test_what_fails_is_said_and_counts(quick_metrics: None, table: Path) -> None:
    (Path("data/images") / "0003.png").write_bytes(b"nothing")
    result = benchmark("-m", "brightness", "-m", "broken", "-m", "distance", "-d", table, "--images", "data/images")
    assert result.code == 1 and "Traceback" not in result.err
    assert "broken on opinions: not run: cannot be built: OSError: the weights are gone" in result.err
    assert "distance on opinions: not run: dataset opinions names no reference images" in result.err
    assert "brightness: 1 failed: it is not an image" in result.err and re.search("brightness.* 29 ", result.out)


def test_opinions_turned_the_wrong_way_are_said_loudly(quick_metrics: None, table: Path) -> None:
    arguments = ["-m", "brightness", "-m", "picky", "-m", "darkness", "-d", table, "--images", "data/images"]
    content = [line.split(",") for line in table.read_text().split()]
    write_csv(table, [content[0], *[[row[0], 9 - float(row[1]), *row[2:]] for row in content[1:]]])
    result = benchmark(*arguments)
    assert "warning: opinions: most metrics contradict the opinions (median SRCC -0.9" in result.err
    assert "Then repeat the command with --dmos" in result.err
    for name in ("report.html", "leaderboard.md", "leaderboard.json"):
        assert "most metrics contradict the opinions" in Path("benchmark", name).read_text()
    entries = json.loads(Path("benchmark/leaderboard.json").read_text())["entries"]
    assert not any(entry["not_worse_than_best"] for entry in entries)  # the order is upside down: none is the best
    right = benchmark(*arguments, "--dmos")
    assert "contradict" not in right.err and "brightness on opinions: 0 images to score" in right.err
    assert json.loads(Path("benchmark/leaderboard.json").read_text())["entries"][0]["not_worse_than_best"]


def test_our_own_scores_are_no_opinions(quick_metrics: None, table: Path) -> None:
    row = ScoreRow("data/images/0000.png", 3.1, metric="qscorer-mini", identity="0" * 16)
    write_rows(Path("scores.csv"), [row, dataclasses.replace(row, path="data/images/0001.png")])
    result = benchmark("-m", "brightness", "-d", "scores.csv", "--images", ".")
    assert result.code == 2 and "column 'score' holds scores that pyiqa-qscorer predicted" in result.err
    # A table of a leaderboard holds both; the opinions are used if they are named.
    assert benchmark("-m", "brightness", "-d", table, "--images", "data/images").code == 0
    again = ["-m", "darkness", "-d", "again=benchmark/scores/opinions/brightness.csv", "--images", "."]
    refused = benchmark(*again)
    assert refused.code == 2 and "--columns mos=COLUMN (one of mos," in refused.err
    assert benchmark(*again, "--columns", "mos=mos", "-o", "again").code == 0


def test_digits_are_kept_in_a_pipe_and_fit_into_80_columns_of_a_terminal(quick_metrics: None, table: Path) -> None:
    name = "a-label-that-is-longer-than-any-terminal-is-wide-and-would-push-all-numbers-out-of-it-if-it-could"
    benchmark("-m", f"{name}=brightness", "-m", "topiq_nr-flive=darkness", "-d", table, "--images", "data/images")
    [line] = [line for line in benchmark("--report-only").out.splitlines() if line.startswith(name)]
    assert re.fullmatch(rf"{name} +0\.\d{{3}} +0\.\d{{3}}, 0\.\d{{3}}( +0\.\d{{3}}){{3}} +30 +\S+ *", line)
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=True, width=80, highlight=False)
    print_tables(terminal_tables(read_leaderboard(Path("benchmark"), 50)), console)
    shown = re.sub("\x1b\\[[0-9;]*m", "", buffer.getvalue())
    assert "…" not in shown and "..." not in shown and max(map(len, shown.splitlines())) <= 80
    assert re.search(r"topiq_nr-flive +-0\.\d{3} +-0\.\d{3}, -0\.\d{3}( +-?0\.\d{3}){3} +30 ", shown)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "britness"], "no metric 'britness'; did you mean 'brightness'"),
        (["-d", "koniq10"], "no dataset 'koniq10'; did you mean 'koniq10k'"),
        (
            ["-d", "spaq", "--data-root", "nowhere"],
            "dataset spaq: nowhere/meta_info/meta_info_SPAQDataset.csv is missing; put the dataset there, or say with "
            "--data-root (in a training configuration data.data_root) where it is.",
        ),
        (["-d", "none.csv"], "csv none.csv does not exist"),
        (["--images", "none"], "images: the folder none does not exist"),
        (["--images", "."], "dataset opinions: none of its 30 images exists, e.g. 0000.png"),
        (["--references", "none"], "references: the folder none does not exist"),
        (["--columns", "mos=opinion"], "mos_column 'opinion' is not in data/opinions.csv; its columns are"),
        (["--columns", "colour=mos"], "colour is no role; the roles are file, mos, std, reference, split"),
        (["--phase", "test"], "--phase test needs --columns split=COLUMN for data/opinions.csv"),
        (
            ["--split", "3"],
            "--split 3 is for pyiqa's datasets: give --columns split=COLUMN and --phase NAME for data/opinions.csv",
        ),
        (["--columns", "split=std"], "columns split=std needs a phase for data/opinions.csv"),
        (["--device", "gpu"], "device must be like 'cpu'"),
        (["--check-published"], "this output has none of these"),
    ],
)
def test_wrong_usage(quick_metrics: None, table: Path, arguments: list[str], words: str) -> None:
    given = {"-m": ["brightness"], "-d": [table], "--images": ["data/images"]}
    if "-d" in arguments:
        given.pop("--images")
    for flag in given.keys() & set(arguments):
        given.pop(flag)
    result = benchmark(*[part for flag, values in given.items() for part in (flag, *values)], *arguments)
    assert words in " ".join(result.err.split()) and result.code == 2 and "Traceback" not in result.err


@pytest.mark.slow
def test_killed_and_interrupted_runs_resume_to_the_same_table(quick_metrics: None, table: Path) -> None:
    arguments = ["-m", "brightness", "-m", "darkness", "-d", str(table), "--images", "data/images"]
    assert benchmark(*arguments, "-o", "expected").code == 0
    command, log = [*PROGRAM, "benchmark", *arguments, "--workers", "2"], Path("log.txt")
    slow = program(FAKE_SECONDS_PER_IMAGE=0.1, FAKE_LOG=log)
    partial = Path("benchmark/scores/opinions/brightness.csv.partial.jsonl")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **slow)
    wait_for_lines(partial, 8, process)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    with partial.open("ab") as file:
        file.write(b'{"path": "torn')
    partial = partial.with_name("darkness.csv.partial.jsonl")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, **slow)
    wait_for_lines(partial, 8, process)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "repeat the command to go on" in message and "Traceback" not in message
    done = subprocess.run(command, capture_output=True, timeout=300, **slow)
    assert done.returncode == 0, done.stderr
    for metric in ("brightness", "darkness"):
        assert scores(metric) == scores(metric, "expected")
    scored = log.read_text().splitlines()
    assert len(set(scored)) == 2 * len(LEVELS)
    # Only the image in work when the process was stopped is scored again.
    assert len(scored) <= 2 * len(LEVELS) + 2
    assert {path.suffix for path in partial.parent.iterdir()} == {".csv", ".json"}


def test_full_disk_keeps_what_was_scored(quick_metrics: None, table: Path) -> None:
    arguments = ["-m", "brightness", "-d", table, "--images", "data/images"]
    with full_disk(3000):
        done = benchmark(*arguments)
    assert done.code == 2 and "Traceback" not in done.err
    assert re.search(r"error: cannot write .*brightness\.csv\.partial\.jsonl: File too large", done.err)
    result = benchmark(*arguments)
    assert result.code == 0 and re.search(r"\d images to score, [1-9]\d? scored before", result.err)
    assert len(scores("brightness")) == len(LEVELS) == sum(row.score is not None for row in rows("brightness"))


@pytest.mark.slow
def test_two_processes_share_the_images_and_one_merges_them(quick_metrics: None, table: Path) -> None:
    Path("data/images/0005.png").write_bytes(b"nothing")
    arguments = ["-m", "brightness", "-m", "broken", "-m", "picky", "-d", str(table), "--images", "data/images"]
    assert benchmark(*arguments, "-o", "expected").code == 1
    log = Path("log.txt")
    # What accelerate starts for several GPUs; `accelerate launch --cpu` starts one process only, unless there is MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, *PROGRAM[1:], "benchmark", *arguments]
    # What a killed run of three processes left behind is taken over.
    expected = rows("brightness", "expected")
    left = Path("benchmark/scores/opinions/brightness.part-1.jsonl.partial.jsonl")
    left.parent.mkdir(parents=True)
    for part, row in ((left, expected[7]), (left.with_name("brightness.part-2.jsonl"), expected[11])):
        part.write_text(json.dumps(dataclasses.asdict(row)) + "\n")
    done = subprocess.run(command, capture_output=True, timeout=500, **program(FAKE_LOG=log))
    assert "broken on opinions: not run" in done.stderr, done.stderr
    # torchrun ends with 1 whatever happened, and says how each process ended: only the one that reports did, as alone.
    assert done.returncode == 1 and re.findall(r"rank +: (\d).*\n +exitcode +: (-?\d+)", done.stderr) == [("0", "1")]
    for metric in ("brightness", "picky"):
        assert scores(metric) == scores(metric, "expected")
    assert json.loads(Path("benchmark/scores/opinions/brightness.json").read_text())["processes"] == 2
    lines = [line for line in log.read_text().splitlines() if line.startswith("brightness")]
    assert len(lines) == len(set(lines)) == len(LEVELS) - 3  # the broken image, and the two that were left
    assert {path.suffix for path in left.parent.iterdir()} == {".csv", ".json"}


@pytest.mark.parametrize(
    ("device", "variable", "cpu"),
    [(None, "", False), ("cuda", "", False), ("cpu", "", True), (None, "true", True), ("cuda", "true", False)],
)
def test_several_processes_run_where_the_user_says(monkeypatch, device, variable, cpu) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", variable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    state = SimpleNamespace(device=torch.device("cpu"))
    asked: list[bool] = []
    monkeypatch.setattr(runner, "PartialState", lambda cpu, timeout: asked.append(cpu) or state)
    assert runner.start_processes(device) == (state, state.device) and asked == [cpu]
    if cpu:
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for refused, words in (("cuda", "'cuda' does not exist"), ("cuda:1", "cannot be shared by several processes")):
        with pytest.raises(QScorerError, match=words):
            runner.start_processes(refused)


def test_pyiqas_metrics_on_a_dataset_of_pyiqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = write_dataset(tmp_path / "CSIQ", range(40, 240, 20), sizes=[(64, 48)], references=True)
    Path("CSIQ/images").rename("CSIQ/dst_imgs")
    Path("CSIQ/src_imgs").mkdir()
    Path("CSIQ/dst_imgs/ref_64.png").rename("CSIQ/src_imgs/ref_64.png")
    Path("meta_info").mkdir()
    given = [line.split(",") for line in table.read_text().split()[1:]]
    write_csv(
        Path("meta_info/meta_info_CSIQDataset.csv"),
        [["ref_name", "dist_name", "dmos", "std"], *[[row[3], row[0], 1 - float(row[1]) / 6, 0.1] for row in given]],
    )
    result = benchmark(
        "-m", "psnr", "-m", "gmsd", "-m", "entropy", "-d", "csiq", "--data-root", ".", "--batch-size", "4"
    )
    assert result.code == 0, result.err
    import pyiqa

    psnr = pyiqa.create_metric("psnr", device="cpu")
    for row in rows("psnr", dataset="csiq"):
        assert row.score == pytest.approx(psnr(row.path, "CSIQ/src_imgs/ref_64.png").item(), abs=1e-4)
    content = json.loads(Path("benchmark/leaderboard.json").read_text())
    by_name = {one["metric"]: one for one in content["entries"]}
    assert by_name["psnr"]["mode"] == "FR" and by_name["gmsd"]["lower_better"]
    assert by_name["psnr"]["dataset_facts"]["lower_better"] and by_name["psnr"]["agreement"]["srcc"] > 0.9


def test_our_name_in_pyiqas_benchmark_loop_and_in_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyiqa's benchmark builds metric and dataset from their options, takes one image a time, and correlates."""
    monkeypatch.chdir(tmp_path)
    table = write_dataset(tmp_path / "data", range(40, 240, 20), sizes=[(40, 30), (64, 64)])
    lora, base, _ = published_folders(tmp_path)
    from pyiqa.data import build_dataloader, build_dataset
    from pyiqa.default_model_configs import DEFAULT_CONFIGS
    from pyiqa.metrics import calculate_krcc, calculate_plcc, calculate_srcc
    from pyiqa.models.inference_model import InferenceModel

    config = DEFAULT_CONFIGS["qscorer"]
    options = {**config["metric_opts"], "checkpoint": str(lora), "base": str(base), "dtype": "float32"}
    model = InferenceModel("qscorer", metric_mode=config["metric_mode"], device="cpu", **options)
    data = {
        "name": "own", "type": "GeneralNRDataset", "phase": "test", "meta_info_file": str(table),
        "dataroot_target": str(table.parent / "images"), "prefetch_mode": "cpu", "num_prefetch_queue": 2,
    }  # fmt: skip
    predicted, opinions = [], []
    for batch in build_dataloader(build_dataset(data), data, num_gpu=0):
        predicted.append(model(batch["img"]).item())
        opinions.append(batch["mos_label"].item())
    measured = [measure(predicted, opinions) for measure in (calculate_plcc, calculate_srcc, calculate_krcc)]
    cell = "/".join(str(round(float(value), 4)) for value in measured)
    settings = [f"--set=qscorer.{name}={options[name]}" for name in ("checkpoint", "base", "dtype")]
    given = ["-m", "qscorer", "-d", f"koniq10k={table}", "--images", "data/images"]
    result = benchmark(*given, *settings, "--batch-size", "3")
    assert result.code == 0, result.err
    assert [row.score for row in rows("qscorer", dataset="koniq10k")] == pytest.approx(predicted, abs=1e-4)
    assert Path("benchmark/leaderboard.csv").read_text().splitlines()[1] == f"qscorer,{cell}"
    facts = json.loads(Path("benchmark/scores/koniq10k/qscorer.json").read_text())
    files = sum(path.stat().st_size for folder in (lora, base) for path in folder.iterdir())
    assert facts["download_bytes"] == files and facts["parameters"] > 1000 and facts["options"]["base"] == str(base)
    checked = benchmark("--report-only", "--check-published")
    assert checked.code == 1 and re.search(r"qscorer +koniq10k +SRCC +differs +0\.948 ", checked.out)
    assert checked.out.count("differs") == 2 and "agrees: within 0.005" in " ".join(checked.out.split())
