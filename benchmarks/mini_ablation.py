"""What the formulation costs at the scale of `qscorer-mini`: score tokens against one-hot and soft levels.

    pyiqa-qscorer render mini.yaml --photos ../shared/data/photos
    python benchmarks/mini_ablation.py --work runs/ablation

Short runs of the first step of the mini's recipe with several seeds; features of the pictures are computed once.
Repeat the command to go on. Prints a table and writes `benchmarks/results/mini_ablation.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pyiqa_qscorer.files import write_text
from pyiqa_qscorer.model.configuration import FORMULATIONS
from pyiqa_qscorer.training.config import read_config
from pyiqa_qscorer.training.run import train

RESULTS = Path(__file__).with_name("results")
MEASURES = ("srcc", "plcc", "rmse")


def one_run(arguments: argparse.Namespace, formulation: str, seed: int) -> dict[str, float]:
    changes: dict[str, Any] = {
        "output": str(arguments.work / f"{formulation}_{seed}"),
        "data.statistics": str(arguments.work / "statistics"),
        **{
            f"data.{phase}.{number}.csv": str(arguments.rendered / phase / name / "labels.csv")
            for phase in ("train", "validation")
            for number, name in enumerate(("chains", "kadid"))
        },
        "model.formulation": formulation,
        "training.seed": seed,
        "training.num_train_epochs": arguments.epochs,
    }
    result = train(read_config(Path("mini.yaml"), changes))
    if not result.finished:
        raise SystemExit("stopped by a signal; repeat the command to go on")
    return {name: result.metrics[f"validation_{name}"] for name in MEASURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--rendered", type=Path, default=Path("runs/mini_rendered"), help="what render wrote")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 100), metavar="N")
    arguments = parser.parse_args()
    started = time.monotonic()
    runs = {
        formulation: [one_run(arguments, formulation, seed) for seed in range(arguments.seeds)]
        for formulation in FORMULATIONS
    }
    table = Table(title=f"Kodak, mean of chains and KADID distortions: mean and spread over {arguments.seeds} seeds")
    for column in ("formulation", *(name.upper() for name in MEASURES)):
        table.add_column(column)
    for formulation, found in runs.items():
        cells = []
        for name in MEASURES:
            values = [run[name] for run in found]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}")
        table.add_row(formulation, *cells)
    Console().print(table)
    facts = {
        "epochs": arguments.epochs,
        "runs": runs,
        "seconds": time.monotonic() - started,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("pyiqa-qscorer", "torch", "transformers", "timm")},
    }
    write_text(RESULTS / "mini_ablation.json", json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
