"""How fast a large folder is scored, and in how much memory: a pyiqa loop, `Scorer`, Ray with one and two actors.

    python benchmarks/scale.py PHOTOS [--images 20000] [--work DIR]

Every way is a process of its own over the same hard links to the photos, by what a user would run; one after the
other, in one run. Rates are of the images beyond the first `--first`, whose own run is timed too, so that loading does
not count. Memory is what the processes of a way hold for themselves (USS), every two seconds; the growth is of the
largest value in the last quarter over the one at the end of the first. `results/scale.json` has all of it. For figures
of record the machine must be otherwise idle.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table
from source_commit import source_commit

RESULTS = Path(__file__).resolve().parent / "results"
LOOP = """
import sys, pathlib, pyiqa
metric = pyiqa.create_metric("qscorer-mini", device="cpu")
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    metric(str(path))
"""
DECODE = """
import sys, time, pathlib, torch
from pyiqa_qscorer import Scorer
torch.set_num_threads(1)
scorer, paths = Scorer("qscorer-mini", device="cpu"), sorted(map(str, pathlib.Path(sys.argv[1]).iterdir()))[:200]
started = time.process_time()
prepared = [scorer._prepare(path) for path in paths]
decode = time.process_time() - started
started = time.process_time()
scorer.score(paths)
print(decode / len(paths), (time.process_time() - started - decode) / len(paths))
"""
PRICE = 0.04  # of one core for an hour, in dollars; an assumption
out = Console()


def ways(folder: Path, results: Path) -> dict[str, list[str]]:
    """Commands by name; each writes into `results`, but for the loop, which writes nothing."""
    command = [sys.executable, "-m", "pyiqa_qscorer.cli", "score", str(folder), "--device", "cpu", "--output"]
    ray = [*command, str(results / "ray"), "--engine", "ray", "--actors"]
    return {
        "pyiqa loop": [sys.executable, "-c", LOOP, str(folder)],
        "Scorer": [*command, str(results / "scorer.parquet")],
        "Ray, 1 actor": [*ray, "1"],
        "Ray, 2 actors": [*ray, "2"],
    }


def link(photos: list[Path], folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        photo = photos[number % len(photos)]
        os.link(photo, folder / f"{number:06d}{photo.suffix}")
    return folder


def run(command: list[str], log: Path) -> tuple[float, list[tuple[float, int]]]:
    """Seconds, and (seconds since the start, bytes held by all processes)."""
    memory: list[tuple[float, int]] = []
    started = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream)
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            memory.append((time.monotonic() - started, held(tree)))
            time.sleep(2)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])} ... ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return seconds, memory


def held(tree: psutil.Process) -> int:
    """USS of a process and its children; Ray's processes detach themselves, so by name wherever they are."""
    total = 0
    for process in psutil.process_iter():
        try:
            ours = process.pid == tree.pid or any(parent.pid == tree.pid for parent in process.parents())
            if ours or process.name().startswith(("ray", "raylet", "gcs_server")):
                total += process.memory_full_info().uss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def growth(memory: list[tuple[float, int]]) -> float:
    """Largest value in the last quarter over that around the end of the first, less one."""
    quarter = max(1, len(memory) // 4)
    early = max(value for _, value in memory[max(0, quarter - quarter // 2) : quarter + quarter // 2 + 1])
    return max(value for _, value in memory[-quarter:]) / early - 1


def main(
    photos: Annotated[Path, typer.Argument(help="folder of real photos, all of which are linked to in turn")],
    images: Annotated[int, typer.Option(min=200)] = 20_000,
    first: Annotated[int, typer.Option(min=20, help="images of the run that only tells the time of loading")] = 100,
    work: Annotated[Path | None, typer.Option(help="folder on the disk of the photos, for the links")] = None,
) -> None:
    found = sorted(path for path in photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    facts: dict[str, Any] = {
        "commit": source_commit(), "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "load before": os.getloadavg()[0], "photos": len(found), "images": images,
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=work or photos.parent) as folder:
        top = Path(folder)
        few, many = link(found, top / "few", first), link(found, top / "many", images)
        facts["bytes an image"] = sum(path.stat().st_size for path in many.iterdir()) / images
        decode = subprocess.run([sys.executable, "-c", DECODE, str(many)], capture_output=True, text=True, check=True)
        facts["CPU seconds an image: read and resize, model"] = [float(part) for part in decode.stdout.split()]
        for name in ways(few, top):
            times, memory = [], []
            for part in (few, many):
                results = top / f"results {part.name} {name}"
                results.mkdir()
                seconds, memory = run(ways(part, results)[name], top / "log")
                times.append(seconds)
            rate = (images - first) / (times[1] - times[0])
            hours = (os.cpu_count() or 1) / rate * 1e6 / 3600
            rows[name] = {
                "images/s": rate, "seconds": times[1], "seconds of the first": times[0],
                "core hours a million": hours, "dollars a million": hours * PRICE,
                "MB at most": max(value for _, value in memory) / 1e6, "growth": growth(memory),
                "memory": [(round(second, 1), value) for second, value in memory],
            }  # fmt: skip
            out.print(f"{name}: {rate:.2f} images/s")
    facts |= {"load after": os.getloadavg()[0], "ways": rows}
    (RESULTS / "scale.json").write_text(json.dumps(facts, indent=1) + "\n")
    base = rows["pyiqa loop"]["images/s"], rows["Scorer"]["images/s"]
    table = Table("", "images/s", "of the loop", "of Scorer", "MB at most", "growth", "core hours a million", "$")
    for name, row in rows.items():
        ratios = (f"{row['images/s'] / one:.2f}" for one in base)
        table.add_row(
            name, f"{row['images/s']:.2f}", *ratios, f"{row['MB at most']:,.0f}", f"{row['growth']:+.1%}",
            f"{row['core hours a million']:.1f}", f"{row['dollars a million']:.2f}",
        )  # fmt: skip
    out.print(table)
    out.print({name: value for name, value in facts.items() if name != "ways"})


if __name__ == "__main__":
    typer.run(main)
