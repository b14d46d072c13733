"""A first run without any download: writes a tiny checkpoint with RANDOM weights and scores the sample photos with it.

It shows that the installation works: checkpoint on disk -> metric -> scores. The scores mean nothing.

    python benchmarks/first_run.py [IMAGE_OR_FOLDER ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from pyiqa_qscorer import Scorer
from pyiqa_qscorer.checkpoints import save_folder
from pyiqa_qscorer.checkpoints.starting import Formulation, start_new
from pyiqa_qscorer.score_files import find_images
from pyiqa_qscorer.training.tokenizer import prompt_tokenizer

SAMPLES = Path(__file__).resolve().parent.parent / "tests" / "photos"
PART = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURE = {
    **PART,
    "initializer_range": 0.3,
    "regressor_hidden_sizes": [16, 8],
    "vision_config": {**PART, "image_size": 448, "patch_size": 28, "initializer_range": 0.3},
    "abstractor_config": {**PART, "num_learnable_queries": 8, "grid_size": 16, "initializer_range": 0.3},
}


def main() -> None:
    console = Console()
    inputs = sys.argv[1:] or [str(SAMPLES)]
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        start = start_new(ARCHITECTURE, prompt_tokenizer(), Formulation("score_token", 5, ()))
        checkpoint = save_folder(Path(folder) / "random", start.model, start.tokenizer)
        scorer = Scorer("qscorer", device="cpu", checkpoint=checkpoint, dtype="float32", clamp=False)
        results = list(scorer.score_iter(find_images(inputs).paths))
    table = Table(title="RANDOM WEIGHTS: these scores only show that scoring works", title_style="bold red")
    table.add_column("score", justify="right")
    table.add_column("image")
    for result in sorted(results, key=lambda item: -(item.score or 0.0)):
        table.add_row("failed" if result.score is None else f"{result.score:.3f}", Path(result.source).name)
    console.print(table)


if __name__ == "__main__":
    main()
