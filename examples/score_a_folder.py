"""Score every photo of a folder, best first; a broken file does not stop the others."""

from __future__ import annotations

from pathlib import Path

from pyiqa_qscorer import Scorer

PHOTOS = Path(__file__).resolve().parents[1] / "tests" / "photos"


def main() -> None:
    # The weights of qscorer-mini are inside the package. Scorer("qscorer") is the published 7B model (18 GB download).
    scorer = Scorer("qscorer-mini", device="cpu", batch_size=4)
    # score_iter gives one result per image, in input order, while the files are read ahead in threads. An image that
    # cannot be read has `error` instead of `score`; scorer.score(paths) would raise after trying all.
    results = list(scorer.score_iter(sorted(PHOTOS.glob("*.jpg"))))
    scored = [(item.score, item.source) for item in results if item.score is not None]
    for score, source in sorted(scored, reverse=True):
        print(f"{score:.3f}  {Path(source).name}")
    for item in results:
        if item.error is not None:
            print(f"failed {item.source}: {item.error}")


if __name__ == "__main__":
    main()
