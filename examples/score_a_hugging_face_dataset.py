"""Add a quality to every image of a Hugging Face dataset and keep the good ones: pip install datasets"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets

from pyiqa_qscorer import Scorer

PHOTOS = Path(__file__).resolve().parents[1] / "tests" / "photos"


def main() -> int:
    folder = sys.argv[1] if len(sys.argv) > 1 else str(PHOTOS)
    images = datasets.Dataset.from_dict({"image": sorted(map(str, Path(folder).glob("*.jpg")))})
    images = images.cast_column("image", datasets.Image())  # `load_dataset(...)` gives the same column
    scorer = Scorer("qscorer-mini")
    scored = images.map(
        lambda batch: {"quality": scorer.score(batch["image"], on_error="nan")},
        batched=True,
        batch_size=64,
        new_fingerprint=f"quality-{scorer.identity}",  # so that another checkpoint is not taken from the cache
    )
    good = scored.filter(lambda quality: quality >= 3.5, input_columns="quality")
    print(f"kept {len(good)} of {len(scored)}")
    for row in scored.sort("quality").select_columns("quality"):
        print(f"{row['quality']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
