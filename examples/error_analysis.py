"""How much accuracy is lost when a MOS is told as a word or a token, before any network errs."""

from __future__ import annotations

import csv
import random
import sys
import tempfile
from pathlib import Path

from pyiqa_qscorer.cli.app import app


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="errors_"))
    table = folder / "opinions.csv"
    chance = random.Random(0)
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("file", "mos", "std"))
        for index in range(500):  # made-up opinions on 1..5; `std` is the spread among the people asked
            mos, std = min(max(chance.gauss(3.2, 0.8), 1), 5), chance.uniform(0.4, 0.9)
            rows.writerow((f"{index}.jpg", f"{mos:.3f}", f"{std:.3f}"))
    # In a shell: pyiqa-qscorer errors --mos opinions.csv --std-column std --range 1 5 --levels 5,10 -o report
    # --checkpoint DIR --data IMAGES adds the measured error of trained networks.
    inputs = ["--mos", str(table), "--std-column", "std", "--range", "1", "5"]
    code = app(["errors", *inputs, "--levels", "5,10", "-o", str(folder / "report")], standalone_mode=False)
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
