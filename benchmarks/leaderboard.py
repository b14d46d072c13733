"""The leaderboard on the data that lies beside this repository: LIVE JPEG, and Kodak photos with KADID's distortions.

    python benchmarks/leaderboard.py                     # everything: 24 photos x 25 types x 5 levels, 8 metrics
    python benchmarks/leaderboard.py --photos 4 --type 1 --type 10 -m qscorer-mini -m piqe

Stops and goes on as `pyiqa-qscorer benchmark` does. Figures go to `results/leaderboard.json`, with machine, versions
and commit; the page with the plots stays in OUTPUT, since it holds small copies of the pictures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from source_commit import source_commit

from pyiqa_qscorer.files import write_text

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"
METRICS = ["qscorer-mini", "piqe", "entropy", "ssim", "fsim", "vif", "gmsd", "psnr"]


def main(
    data: Annotated[Path, typer.Option(help="folder with live_jpeg and photos")] = DATA,
    output: Annotated[Path, typer.Option(help="scores, distorted photos, reports")] = Path("leaderboard"),
    metrics: Annotated[list[str] | None, typer.Option("--metric", "-m", help=", ".join(METRICS))] = None,
    photos: Annotated[int, typer.Option(help="Kodak photos, at most 24", min=1)] = 24,
    types: Annotated[list[int] | None, typer.Option("--type", help="only this distortion; repeatable")] = None,
) -> None:
    """Distort, score, report."""
    kodak = output / "kodak"
    chosen = [part for kind in types or () for part in ("--type", str(kind))]
    if code := run(HERE / "kadid_kodak.py", data / "photos" / "kodak", kodak, "--photos", photos, *chosen):
        raise typer.Exit(code)
    chosen = [part for name in metrics or METRICS for part in ("-m", name)]
    command = ["-m", "pyiqa_qscorer.cli", "benchmark", *chosen, "-o", output]
    live = data / "live_jpeg"
    codes = [
        run(*command, "-d", f"live_jpeg={live / 'meta_info_LIVEJPEG.csv'}", "--images", live / "images", "--dmos"),
        run(*command, "-d", f"kodak_kadid={kodak / 'opinions.csv'}"),
    ]
    board = json.loads((output / "leaderboard.json").read_text(encoding="utf-8"))
    board["commit_of_the_report"] = source_commit()  # a score may come from an earlier run
    write_text(HERE / "results" / "leaderboard.json", json.dumps(board, indent=2) + "\n")
    raise typer.Exit(max(codes))


def run(*arguments: object) -> int:
    """Exit code of a Python program: 1 if some images or metrics failed. What could not start ends this one, too."""
    code = subprocess.run([sys.executable, *map(str, arguments)]).returncode
    if code > 1:
        raise typer.Exit(code)
    return code


if __name__ == "__main__":
    typer.run(main)
