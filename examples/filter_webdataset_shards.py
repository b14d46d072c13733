"""Write the good pictures of webdataset shards into new shards: pip install webdataset"""

from __future__ import annotations

import sys
from itertools import islice

import webdataset

from pyiqa_qscorer import Scorer

IMAGES = ("jpg", "jpeg", "png", "webp")


def main(source: str, target: str, threshold: float = 3.5) -> int:
    """source: shards such as 'photos-{000..099}.tar'; target: a pattern such as 'good-%06d.tar'."""
    scorer, kept, seen = Scorer("qscorer-mini"), 0, 0
    samples = iter(webdataset.WebDataset(source, shardshuffle=False))
    with webdataset.ShardWriter(target, maxcount=10_000, verbose=0) as writer:
        while batch := list(islice(samples, 64)):
            images = [next((sample[name] for name in IMAGES if name in sample), b"") for sample in batch]
            for sample, score in zip(batch, scorer.score(images, on_error="nan"), strict=True):
                seen += 1
                if score >= threshold:  # a broken picture's score is NaN, which is not
                    writer.write({**sample, "quality.txt": f"{score:.4f}"})
                    kept += 1
    print(f"kept {kept} of {seen}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
