"""Compare two metrics with human opinions in a CSV file. The opinions here are made up: put your own in their place."""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

from pyiqa_qscorer.cli.app import app

PHOTOS = Path(__file__).resolve().parents[1] / "tests" / "photos"
OPINIONS = {  # mean of the opinions of several people, 1 (bad) to 5 (excellent)
    "astronaut.jpg": 4.6,
    "astronaut_slightly_blurred.jpg": 3.3,
    "astronaut_blurred.jpg": 1.7,
    "astronaut_jpeg_5.jpg": 1.4,
    "cat.jpg": 4.4,
    "cat_jpeg_15.jpg": 3.0,
    "cat_noisy.jpg": 2.1,
    "coffee.jpg": 4.5,
    "coffee_upscaled_4x.jpg": 2.0,
}


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="leaderboard_"))
    table = folder / "opinions.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "mos"), *OPINIONS.items()])
    # In a shell: pyiqa-qscorer benchmark -m qscorer-mini -m piqe -d opinions.csv --images tests/photos -o report
    inputs = ["-d", str(table), "--images", str(PHOTOS), "-o", str(folder / "report"), "--device", "cpu"]
    code = app(["benchmark", "-m", "qscorer-mini", "-m", "piqe", *inputs], standalone_mode=False)
    print(f"Page with plots, intervals and the largest disagreements: {folder / 'report' / 'report.html'}")
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
