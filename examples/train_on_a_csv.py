"""Fine-tune qscorer-mini on a folder of images and a table of opinions, then score with the result."""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageFilter

from pyiqa_qscorer import Scorer
from pyiqa_qscorer.cli.app import app

PHOTOS = Path(__file__).resolve().parents[1] / "tests" / "photos"


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="train_"))
    rows = [("file", "mos", "split")]
    for name, split in (("astronaut", "train"), ("coffee", "train"), ("cat", "val")):  # no photo in both parts
        for radius in range(6):  # made-up opinions on a scale of 0 to 100: more blur is worse
            blur = ImageFilter.GaussianBlur(radius)
            Image.open(PHOTOS / f"{name}.jpg").filter(blur).save(folder / f"{name}_{radius}.png")
            rows.append((f"{name}_{radius}.png", f"{90 - 15 * radius}", split))
    table = folder / "labels.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    # finetune_mini.yaml comes with the package; in a shell: pyiqa-qscorer train finetune_mini.yaml --set KEY=VALUE ...
    changes = [f"output={folder / 'run'}", "training.num_train_epochs=2", "training.per_device_train_batch_size=4"]
    for part in ("data.train.0", "data.validation.0"):
        changes += [f"{part}.csv={table}", f"{part}.folder={folder}", f"{part}.mos_range=[0, 100]"]
    code = app(["train", "finetune_mini.yaml", *(f"--set={change}" for change in changes)], standalone_mode=False)
    scorer = Scorer(checkpoint=str(folder / "run" / "checkpoint_qscorer"), device="cpu")
    print("Scores of the blurred cat:", scorer.score([folder / f"cat_{radius}.png" for radius in range(6)]))
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
